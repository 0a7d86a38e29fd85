"""silu_mul, gelu_mul and their quantised forms in Triton (formulas: gated_act.h).

A block takes a tile of rows, all columns of them when it quantises by row. Bound by memory: gate and up are read once,
the result is written once. Rows beyond 16384 elements are quantised in a second pass, with the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common.triton_util import activate, ahead, launch, next_power_of_2
from ..quantize import findings_of
from ..quantize.quantize_triton import quantize_rows, store_quantised

#: Elements of a row that one block holds in registers.
_LONGEST = 16384


@triton.jit
def _gated_act(
    gate, up, y, q, scale, findings, rows, columns, ld_gate, ld_up, groups, size,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Stores y, or q and scale: the others are None."""
    first = tl.program_id(0) * ROWS
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    g = tl.load(gate + row * ld_gate + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * ld_up + column, mask=inside, other=0.0).to(tl.float32)
    v = activate(g, ACTIVATION) * u
    if q is None:
        tl.store(y + row * columns + column, v.to(y.dtype.element_ty), mask=inside)
    else:
        store_quantised(
            v, first, rows, columns, tl.program_id(1) * (BLOCK // GROUP), groups, size, q, scale, findings,
            ROWS, BLOCK, GROUP,
        )  # fmt: skip


def _check(op: str, gate: Tensor, up: Tensor, group_size: int) -> None:
    checks.require(
        gate.dtype in checks.FLOATING and gate.dim() >= 1,
        op,
        f"gate must be float32, float16 or bfloat16 [..., K], got {checks.describe(gate)}",
    )
    checks.require(
        up.dtype == gate.dtype and up.shape == gate.shape,
        op,
        f"up must have the dtype and shape of gate, {checks.describe(gate)}, got {checks.describe(up)}",
    )
    checks.require_device(op, "up", up, gate.device)
    checks.require_group(op, group_size, gate.shape[-1])


def _plain(op: str, gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype | None = None) -> Tensor:
    _check(op, gate, up, 0)
    y = gate.new_empty(gate.shape, dtype=dtype or gate.dtype)
    if y.numel():
        g, u = checks.rows_of(gate), checks.rows_of(up)
        rows, columns = g.shape
        block = min(next_power_of_2(columns), 1024)
        per_program = max(1, 1024 // block)
        launch(
            _gated_act, (triton.cdiv(rows, per_program), triton.cdiv(columns, block)),
            g, u, y, None, None, None, rows, columns, g.stride(0), u.stride(0), 1, columns,
            on=gate, ACTIVATION=activation, ROWS=per_program, BLOCK=block, GROUP=block,
        )  # fmt: skip
    return y


def _int8(op: str, gate: Tensor, up: Tensor, activation: str, group_size: int) -> tuple[Tensor, Tensor]:
    _check(op, gate, up, group_size)
    columns = gate.shape[-1]
    size = group_size or columns
    by_group = 0 < group_size <= 1024 and group_size & (group_size - 1) == 0
    if gate.numel() == 0 or not (by_group or (size == columns and columns <= _LONGEST)):
        return quantize_rows(op, _plain(op, gate, up, activation, torch.float32), group_size, False, False)[
            :2
        ]
    groups = columns // size
    q = gate.new_empty(gate.shape, dtype=torch.int8)
    scale = gate.new_empty((*gate.shape[:-1], groups) if group_size else gate.shape[:-1], dtype=torch.float32)
    g, u = checks.rows_of(gate), checks.rows_of(up)
    block = min(next_power_of_2(columns), 1024) if by_group else next_power_of_2(columns)
    block = max(block, size if by_group else 1)
    per_program = max(1, 1024 // block)
    with findings_of(op, gate.device) as findings:
        launch(
            _gated_act, (triton.cdiv(g.shape[0], per_program), triton.cdiv(columns, block)),
            g, u, None, q, scale, findings, g.shape[0], columns, g.stride(0), u.stride(0), groups, size,
            on=gate, ACTIVATION=activation, ROWS=per_program, BLOCK=block,
            GROUP=size if by_group else block, num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )  # fmt: skip
    return q, scale


def _gelu(op: str, approximate: str) -> str:
    checks.require(
        approximate in ("none", "tanh"), op, f"approximate must be none or tanh, got '{approximate}'"
    )
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return _plain("silu_mul", gate, up, "silu")


def silu_mul_int8(gate: Tensor, up: Tensor, group_size: int = 0) -> tuple[Tensor, Tensor]:
    return _int8("silu_mul_int8", gate, up, "silu", group_size)


def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    return _plain("gelu_mul", gate, up, _gelu("gelu_mul", approximate))


def gelu_mul_int8(
    gate: Tensor, up: Tensor, approximate: str = "none", group_size: int = 0
) -> tuple[Tensor, Tensor]:
    return _int8("gelu_mul_int8", gate, up, _gelu("gelu_mul_int8", approximate), group_size)


def _ahead(dtype: str, block: int, warps: int, group: int = 0, activation: str = "silu"):
    arguments = {
        "gate": dtype, "up": dtype, "y": None if group else dtype, "q": "*i8" if group else None,
        "scale": "*fp32" if group else None, "findings": "*i64" if group else None, "rows": "i32",
        "columns": "i32:16", "ld_gate": "i32:16", "ld_up": "i32:16", "groups": "i32", "size": "i32:16",
        "ACTIVATION": activation, "ROWS": 1, "BLOCK": block, "GROUP": group or block,
    }  # fmt: skip
    return ahead(_gated_act, arguments, num_warps=warps, wide_loads=True)


AOT = [
    _ahead("*fp16", 1024, 4),
    _ahead("*bf16", 1024, 4, activation="gelu_tanh"),
    _ahead("*fp16", 1024, 4, 64),
    _ahead("*fp16", 16384, 16, 16384),
    _ahead("*fp32", 4096, 8, 4096, "gelu"),
]
