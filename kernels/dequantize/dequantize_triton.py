"""dequantize_int8 and dequantize_groups in Triton (formulas: dequantize_gguf.h and dequantize.h).

A unit is what shares a scale; a program takes a tile of units times elements, so that no index is divided. Bound by the
store of the result. Bit-equal to every other backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common.triton_util import ahead, launch, next_power_of_2

_TILE = 2048


@triton.jit
def _int8(q, scale, zero_point, out, units, size, scale_stride, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    unit = (tl.program_id(0) * UNITS + tl.arange(0, UNITS)).to(tl.int64)
    in_units = unit < units
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = in_units[:, None] & (column < size)
    at = unit[:, None] * size + column
    code = tl.load(q + at, mask=inside, other=0).to(tl.int32)
    if zero_point is not None:
        code -= tl.load(zero_point + unit * scale_stride, mask=in_units, other=0)[:, None]
    s = tl.load(scale + unit * scale_stride, mask=in_units, other=0.0)[:, None]
    tl.store(out + at, (code.to(tl.float32) * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _groups(
    packed, scale, offset, out, units, size, BITS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK: bytes of a group, rounded up; a byte is one code, or two with the even column in the low nibble."""
    unit = (tl.program_id(0) * UNITS + tl.arange(0, UNITS)).to(tl.int64)
    in_units = unit < units
    stored = size * BITS // 8
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = in_units[:, None] & (column < stored)
    byte = tl.load(packed + unit[:, None] * stored + column, mask=inside, other=0)
    s = tl.load(scale + unit, mask=in_units, other=0.0).to(tl.float32)[:, None]
    if offset is not None:
        o = tl.load(offset + unit, mask=in_units, other=0.0).to(tl.float32)[:, None]
    elif BITS == 4:
        o = -8.0 * s
    else:
        o = 0.0 * s
    kind = out.dtype.element_ty
    if BITS == 8:
        w = byte.to(tl.int8, bitcast=True).to(tl.float32) * s + o
        tl.store(out + unit[:, None] * size + column, w.to(kind), mask=inside)
    else:
        byte = byte.to(tl.uint8, bitcast=True).to(tl.int32)
        low = ((byte & 15).to(tl.float32) * s + o).to(kind)
        high = ((byte >> 4).to(tl.float32) * s + o).to(kind)
        wide = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)[None, :]
        inside = in_units[:, None] & (wide < size)
        tl.store(out + unit[:, None] * size + wide, tl.interleave(low, high), mask=inside)


def _cut(units: int, size: int) -> tuple[tuple[int, int], int, int]:
    """Grid, units and elements of a program."""
    block = min(next_power_of_2(size), _TILE)
    per_program = _TILE // block
    return (triton.cdiv(units, per_program), triton.cdiv(size, block)), per_program, block


def dequantize_int8(
    q: Tensor, scale: Tensor, zero_point: Tensor | None = None, group_size: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    op = "dequantize_int8"
    checks.require(
        q.dtype in (torch.int8, torch.uint8) and q.dim() >= 1,
        op,
        f"q must be int8 or uint8 [..., K], got {checks.describe(q)}",
    )
    columns = q.shape[-1]
    checks.require(
        group_size == 0 or (group_size > 0 and columns % group_size == 0),
        op,
        f"group_size must be 0 (one scale per row) or divide K = {columns}, got {group_size}",
    )
    shape = (*q.shape[:-1], columns // group_size) if group_size else q.shape[:-1]
    checks.require(
        scale.dtype == torch.float32 and (scale.shape == shape or (scale.dim() == 0 and not group_size)),
        op,
        "scale must be float32 of the shape of q without its last size, with K / group_size in its place "
        f"(group_size > 0), or a scalar, got {checks.describe(scale)} for q {list(q.shape)}",
    )
    checks.require_device(op, "scale", scale, q.device)
    if zero_point is not None:
        checks.require(
            zero_point.dtype == torch.int32 and zero_point.shape == scale.shape,
            op,
            f"zero_point must be int32 of the shape of scale, {list(scale.shape)}, got {checks.describe(zero_point)}",
        )
        checks.require_device(op, "zero_point", zero_point, q.device)
        zero_point = zero_point.contiguous()
    checks.require_out_floating(op, out_dtype)
    out = torch.empty_like(q, dtype=out_dtype)
    by_value = scale.dim() == 0 and out.stride() == q.stride()  # dense, whatever its order
    if not by_value:
        out = q.new_empty(q.shape, dtype=out_dtype)
    if out.numel():
        size = group_size or columns
        grid, units, block = _cut(out.numel() // size, size)
        launch(
            _int8, grid, q if by_value else q.contiguous(), scale.contiguous(), zero_point, out, out.numel() // size, size,
            1 if scale.dim() else 0, on=q, UNITS=units, BLOCK=block,
        )  # fmt: skip
    return out


def dequantize_groups(
    packed: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, bits: int,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    op = "dequantize_groups"
    checks.require(bits in (4, 8), op, f"bits must be 4 or 8, got {bits}")
    checks.require(
        packed.dim() == 2 and packed.dtype in (torch.uint8, torch.int8),
        op,
        f"packed must be uint8 or int8 [N, K * bits / 8], got {checks.describe(packed)}",
    )
    rows, columns = packed.shape[0], packed.shape[1] * 8 // bits
    checks.require(
        group_size > 0 and columns % group_size == 0 and (bits == 8 or group_size % 2 == 0),
        op,
        f"group_size must be positive, even for bits 4, and divide K = {columns}, got {group_size}",
    )
    checks.require(
        scale.dtype in (torch.float32, torch.float16),
        op,
        f"scale must be float32 or float16, got {checks.name(scale.dtype)}",
    )
    checks.require(
        tuple(scale.shape) == (rows, columns // group_size),
        op,
        f"scale must be [N, K / group_size] = [{rows}, {columns // group_size}], got {list(scale.shape)}",
    )
    checks.require_device(op, "scale", scale, packed.device)
    if offset is not None:
        checks.require(
            offset.dtype == scale.dtype and offset.shape == scale.shape,
            op,
            f"offset must have the shape and dtype of scale, {checks.describe(scale)}, got {checks.describe(offset)}",
        )
        checks.require_device(op, "offset", offset, packed.device)
        offset = offset.contiguous()
    checks.require_out_floating(op, out_dtype)
    out = packed.new_empty((rows, columns), dtype=out_dtype)
    if out.numel():
        grid, units, block = _cut(scale.numel(), group_size * bits // 8)
        launch(
            _groups, grid, packed.contiguous(), scale.contiguous(), offset, out, scale.numel(), group_size,
            on=packed, BITS=bits, UNITS=units, BLOCK=block,
        )  # fmt: skip
    return out


def _groups_ahead(bits: int, size: int, offset: str | None, out: str):
    _, units, block = _cut(1, size * bits // 8)
    arguments = {
        "packed": "*u8", "scale": "*fp16", "offset": offset, "out": out, "units": "i32", "size": "i32:16",
        "BITS": bits, "UNITS": units, "BLOCK": block,
    }  # fmt: skip
    return ahead(_groups, arguments)


AOT = [
    _groups_ahead(4, 32, None, "*fp16"),
    _groups_ahead(4, 128, "*fp16", "*bf16"),
    _groups_ahead(8, 32, None, "*fp16"),
    ahead(
        _int8,
        {
            "q": "*i8", "scale": "*fp32", "zero_point": "*i32", "out": "*fp16", "units": "i32",
            "size": "i32:16", "scale_stride": "i32", "UNITS": 1, "BLOCK": 2048,
        },
        wide_loads=True,
    ),
]  # fmt: skip
