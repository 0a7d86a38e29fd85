"""The norms in Triton: alone, with the residual sum before, with the quantiser behind (formulas: norm.h).

A block holds a few rows in registers, so x is read once: up to 16384 columns. Longer rows are read once per pass.
Per-row scales and groups of a power of two are quantised in the same kernel, others in a second one from float32 results:
the same bits. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common.triton_util import ahead, launch, next_power_of_2
from ..quantize import findings_of
from ..quantize.quantize_triton import quantize_rows, store_quantised

#: Columns that one block holds in registers.
_LONGEST = 16384


@triton.jit
def _load(x, residual, row, column, ld_x, ld_residual, inside):
    s = tl.load(x + row * ld_x + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + row * ld_residual + column, mask=inside, other=0.0).to(tl.float32)
    return s


@triton.jit
def _factor(square, columns, eps):
    """1 / sqrt(mean + eps); NaN where the sum of squares is not finite, as the results of such a row must be."""
    root = tl.sqrt_rn(tl.div_rn(square, columns + tl.zeros_like(square)) + eps)
    return tl.where(square < float("inf"), tl.div_rn(1.0 + tl.zeros_like(root), root), float("nan"))


@triton.jit
def _scaled(s, mean, factor, weight, bias, column, in_columns):
    y = (s - mean) * factor
    if weight is not None:
        y *= tl.load(weight + column, mask=in_columns, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)
    return y


@triton.jit
def _whole(
    x, residual, weight, bias, y, total, q, scale, findings,
    rows, columns, ld_x, ld_residual, groups, size, eps,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Results that are None are not stored."""
    first = tl.program_id(0) * ROWS
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    s = _load(x, residual, row, column, ld_x, ld_residual, inside)
    if total is not None:
        tl.store(total + row * columns + column, s.to(total.dtype.element_ty), mask=inside)
    mean = tl.zeros((ROWS, 1), tl.float32)
    if not RMS:
        mean = tl.div_rn(tl.sum(s, 1), columns + tl.zeros((ROWS,), tl.float32))[:, None]
    centred = tl.where(inside, s - mean, 0.0)
    factor = _factor(tl.sum(centred * centred, 1), columns, eps)[:, None]
    v = _scaled(s, mean, factor, weight, bias, column, column < columns)
    if y is not None:
        tl.store(y + row * columns + column, v.to(y.dtype.element_ty), mask=inside)
    if q is not None:
        store_quantised(v, first, rows, columns, 0, groups, size, q, scale, findings, ROWS, BLOCK, GROUP)


@triton.jit
def _long(
    x, residual, weight, bias, y, total, columns, ld_x, ld_residual, eps,
    RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mean = 0.0
    if not RMS:
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            inside = start + lane < columns
            sums += _load(x, residual, row, start + lane, ld_x, ld_residual, inside)
        mean = tl.sum(sums, 0) / (columns + 0.0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lane < columns
        s = _load(x, residual, row, start + lane, ld_x, ld_residual, inside)
        centred = tl.where(inside, s - mean, 0.0)
        squares += centred * centred
    factor = _factor(tl.sum(squares, 0), columns, eps)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        s = _load(x, residual, row, column, ld_x, ld_residual, inside)
        if total is not None:
            tl.store(total + row * columns + column, s.to(total.dtype.element_ty), mask=inside)
        v = _scaled(s, mean, factor, weight, bias, column, inside)
        tl.store(y + row * columns + column, v.to(y.dtype.element_ty), mask=inside)


def _check(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    group_size: int,
) -> None:  # fmt: skip
    checks.require(
        x.dtype in checks.FLOATING and x.dim() >= 1,
        op,
        f"x must be float32, float16 or bfloat16 [..., K], got {checks.describe(x)}",
    )
    if residual is not None:
        checks.require(
            residual.dtype == x.dtype and residual.shape == x.shape,
            op,
            f"residual must have the dtype and shape of x, {checks.describe(x)}, got {checks.describe(residual)}",
        )
        checks.require_device(op, "residual", residual, x.device)
    columns = x.shape[-1]
    for argument, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            checks.require(
                t.dtype in checks.FLOATING and tuple(t.shape) == (columns,),
                op,
                f"{argument} must be float32, float16 or bfloat16 [{columns}], got {checks.describe(t)}",
            )
            checks.require_device(op, argument, t, x.device)
    if weight is not None and bias is not None:
        checks.require(
            weight.dtype == bias.dtype,
            op,
            f"bias must have the dtype of weight, {checks.name(weight.dtype)}, got {checks.name(bias.dtype)}",
        )
    checks.require(eps >= 0, op, f"eps must not be negative, got {eps}")
    checks.require_group(op, group_size, columns)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    y: Tensor | None, total: Tensor | None, q: Tensor | None = None, scale: Tensor | None = None,
    group_size: int = 0, op: str = "",
) -> None:  # fmt: skip
    """Fills what is not None. Arguments are checked; q is taken by `_fused` only."""
    if x.numel() == 0:
        return
    rows, columns = checks.rows_of(x), x.shape[-1]
    residual = checks.rows_of(residual) if residual is not None else None
    ld_residual = residual.stride(0) if residual is not None else 0
    weight, bias = (t.contiguous() if t is not None else None for t in (weight, bias))
    operands = (rows, residual, weight, bias, y, total)
    if columns > _LONGEST:
        launch(
            _long, (rows.shape[0],), *operands, columns, rows.stride(0), ld_residual, eps,
            on=x, RMS=rms, BLOCK=4096, num_warps=8,
        )  # fmt: skip
        return
    block = next_power_of_2(columns)
    per_program = max(1, min(16, 1024 // block))
    size = group_size or columns
    with findings_of(op, x.device) as findings:
        launch(
            _whole, (triton.cdiv(rows.shape[0], per_program),), *operands,
            q, scale, findings if q is not None else None, rows.shape[0], columns, rows.stride(0), ld_residual,
            columns // size, size, eps,
            on=x, RMS=rms, ROWS=per_program, BLOCK=block, GROUP=group_size or block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )  # fmt: skip


def _int8(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    group_size: int, rms: bool, y: Tensor | None = None, total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and scale; also fills y and total where given."""
    columns = x.shape[-1]
    if x.numel() > 0 and columns <= _LONGEST and group_size & (group_size - 1) == 0:
        q = x.new_empty(x.shape, dtype=torch.int8)
        shape = (*x.shape[:-1], columns // group_size) if group_size else x.shape[:-1]
        scale = x.new_empty(shape, dtype=torch.float32)
        _norm(x, residual, weight, bias, eps, rms, y, total, q, scale, group_size, op)
        return q, scale
    exact = x.new_empty(x.shape, dtype=torch.float32)
    _norm(x, residual, weight, bias, eps, rms, exact, total)
    if y is not None:
        y.copy_(exact)
    return quantize_rows(op, exact, group_size, False, False)[:2]


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check("rms_norm", x, None, weight, None, eps, 0)
    y = _like(x)
    _norm(x, None, weight, None, eps, True, y, None)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, residual, weight, None, eps, 0)
    y, total = _like(x), _like(x)
    _norm(x, residual, weight, None, eps, True, y, total)
    return y, total


def rms_norm_int8(x: Tensor, weight: Tensor, eps: float, group_size: int = 0) -> tuple[Tensor, Tensor]:
    _check("rms_norm_int8", x, None, weight, None, eps, group_size)
    return _int8("rms_norm_int8", x, None, weight, None, eps, group_size, True)


def add_rms_norm_int8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_size: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    _check("add_rms_norm_int8", x, residual, weight, None, eps, group_size)
    total = _like(x)
    return *_int8("add_rms_norm_int8", x, residual, weight, None, eps, group_size, True, None, total), total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check("layer_norm", x, None, weight, bias, eps, 0)
    y = _like(x)
    _norm(x, None, weight, bias, eps, False, y, None)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    _check("add_layer_norm", x, residual, weight, bias, eps, 0)
    y, total = _like(x), _like(x)
    _norm(x, residual, weight, bias, eps, False, y, total)
    return y, total


def layer_norm_int8(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    _check("layer_norm_int8", x, None, weight, bias, eps, group_size)
    return _int8("layer_norm_int8", x, None, weight, bias, eps, group_size, False)


def add_layer_norm_int8(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group_size: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    _check("add_layer_norm_int8", x, residual, weight, bias, eps, group_size)
    y = _like(x)
    return *_int8("add_layer_norm_int8", x, residual, weight, bias, eps, group_size, False, y), y


def _ahead(dtype: str, block: int, warps: int, rms: bool, add: bool, group: int = 0, rows: int = 1):
    arguments = {
        "x": dtype, "residual": dtype if add else None, "weight": dtype, "bias": None if rms else dtype,
        "y": None if group else dtype, "total": dtype if add else None, "q": "*i8" if group else None,
        "scale": "*fp32" if group else None, "findings": "*i64" if group else None, "rows": "i32",
        "columns": "i32:16", "ld_x": "i32:16", "ld_residual": "i32:16", "groups": "i32", "size": "i32:16",
        "eps": "fp32", "RMS": rms, "ROWS": rows, "BLOCK": block, "GROUP": group or block,
    }  # fmt: skip
    return ahead(_whole, arguments, num_warps=warps, wide_loads=True)


AOT = [
    _ahead("*fp16", 4096, 8, True, False),
    _ahead("*bf16", 4096, 8, True, True, 4096),
    _ahead("*fp16", 1024, 4, True, True, 64),
    _ahead("*fp32", 512, 4, False, True, rows=2),
    _ahead("*fp16", 16384, 16, False, True, 16384),
    ahead(
        _long,
        {
            "x": "*fp16", "residual": "*fp16", "weight": "*fp16", "bias": "*fp16", "y": "*fp16",
            "total": "*fp16", "columns": "i32:16", "ld_x": "i32:16", "ld_residual": "i32:16", "eps": "fp32",
            "RMS": False, "BLOCK": 4096,
        },
        num_warps=8,
        wide_loads=True,
    ),
]  # fmt: skip
