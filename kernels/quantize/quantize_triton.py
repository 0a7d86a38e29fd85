"""quantize_* in Triton: one program for a few rows, or for a few groups of rows (formulas: quantize.h).

A unit is what shares a scale: a row, or a group of one. Units of up to 8192 elements stay in registers
between the range and the codes; longer rows are read twice, the second time from L2. Bound by memory:
one read of x, one write of q. Bit-equal to every other backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common.triton_util import ahead, codes, inverse_of, is_finite, launch, next_power_of_2, scale_of
from . import findings_of

#: Elements of a tile: what 4 warps keep in registers without spilling.
_TILE = 8192


@triton.jit
def _count(x, inside, findings):
    """Adds the NaNs and the values that are not finite; the atomics run only where there are some."""
    odd = inside & (is_finite(x) == 0)
    if tl.max(tl.ravel(odd.to(tl.int32)), 0) > 0:
        tl.atomic_add(findings, tl.sum(tl.ravel((inside & (x != x)).to(tl.int64)), 0))
        tl.atomic_add(findings + 1, tl.sum(tl.ravel(odd.to(tl.int64)), 0))


@triton.jit
def _finite(x):
    return tl.where(is_finite(x), x, 0.0)


@triton.jit
def _rows(
    x, q, scale, zero_point, findings, units, groups, size, ld_x,
    ASYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    unit = (tl.program_id(0) * UNITS + tl.arange(0, UNITS)).to(tl.int64)
    in_units = unit < units
    source = x + (unit // groups * ld_x + unit % groups * size)[:, None]
    target = q + (unit * size)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    low = tl.zeros((UNITS,), tl.float32)
    high = tl.zeros((UNITS,), tl.float32)
    if WHOLE:
        inside = in_units[:, None] & (column < size)
        values = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        _count(values, inside, findings)
        low = tl.minimum(low, tl.min(_finite(values), 1))
        high = tl.maximum(high, tl.max(_finite(values), 1))
    else:
        for start in range(0, size, BLOCK):
            inside = in_units[:, None] & (start + column < size)
            values = tl.load(source + start + column, mask=inside, other=0.0).to(tl.float32)
            _count(values, inside, findings)
            low = tl.minimum(low, tl.min(_finite(values), 1))
            high = tl.maximum(high, tl.max(_finite(values), 1))
    zero = tl.zeros((UNITS,), tl.int32)
    if ASYMMETRIC:
        levels = 255.0 + tl.zeros_like(low)
        s = tl.div_rn(high, levels) - tl.div_rn(low, levels)
        s = tl.where(s >= 1.1754943508222875e-38, s, 1.0)
        inverse = inverse_of(s)
        zero = codes(-128.0 - low * inverse, zero, -128, 127)
        tl.store(zero_point + unit, zero, mask=in_units)
        lowest: tl.constexpr = -128
    else:
        s = scale_of(tl.maximum(-low, high), 127.0)
        inverse = inverse_of(s)
        lowest: tl.constexpr = -127
    tl.store(scale + unit, s, mask=in_units)
    if WHOLE:
        code = codes(values * inverse[:, None], zero[:, None], lowest, 127)
        tl.store(target + column, code.to(tl.int8), mask=inside)
    else:
        for start in range(0, size, BLOCK):
            inside = in_units[:, None] & (start + column < size)
            values = tl.load(source + start + column, mask=inside, other=0.0).to(tl.float32)
            code = codes(values * inverse[:, None], zero[:, None], lowest, 127)
            tl.store(target + start + column, code.to(tl.int8), mask=inside)


@triton.jit
def store_quantised(
    values, first_row, rows, columns, first_group, groups, size, q, scale, findings,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, BLOCK] of float32 results, as quantize_int8 would store it; for kernels that quantise at their end.

    A row of ``columns`` has ``groups`` of ``size`` elements, GROUP apart in the tile: size == GROUP, or one group a row.
    """
    per_row: tl.constexpr = BLOCK // GROUP
    unit = tl.arange(0, ROWS * per_row)
    row = (first_row + unit // per_row).to(tl.int64)
    group = first_group + unit % per_row
    in_units = (row < rows) & (group < groups)
    column = tl.arange(0, GROUP)[None, :]
    inside = in_units[:, None] & (column < size)
    values = tl.where(inside, tl.reshape(values, (ROWS * per_row, GROUP)), 0.0)
    _count(values, inside, findings)
    s = scale_of(tl.max(tl.abs(_finite(values)), 1), 127.0)
    tl.store(scale + row * groups + group, s, mask=in_units)
    code = codes(values * inverse_of(s)[:, None], 0, -127, 127).to(tl.int8)
    tl.store(q + (row * columns + group * size)[:, None] + column, code, mask=inside)


@triton.jit
def _static(
    x, q, findings, count, inverse, zero_point,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    values = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    _count(values, inside, findings)
    tl.store(q + i, codes(values * inverse, zero_point, LOW, HIGH).to(q.dtype.element_ty), mask=inside)


def quantize_rows(
    op: str, x: Tensor, group_size: int, asymmetric: bool, strict: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, scale and the zero points (None when symmetric)."""
    checks.require_floating(op, "x", x)
    checks.require_rows(op, "x", x)
    columns = x.shape[-1]
    checks.require_group(op, group_size, columns)
    groups = columns // group_size if group_size else 1
    shape = (*x.shape[:-1], groups) if group_size else x.shape[:-1]
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(shape, dtype=torch.float32)
    zero_point = x.new_empty(shape, dtype=torch.int32) if asymmetric else None
    units, size = scale.numel(), group_size or columns
    if units:
        rows = checks.rows_of(x)
        block = min(next_power_of_2(size), _TILE)
        per_program = max(1, min(16, 1024 // block))
        with findings_of(op, x.device, strict) as findings:
            launch(
                _rows, (triton.cdiv(units, per_program),),
                rows, q, scale, zero_point, findings, units, groups, size, rows.stride(0),
                on=x, ASYMMETRIC=asymmetric, WHOLE=size <= block, UNITS=per_program, BLOCK=block,
                num_warps=4 if block <= 2048 else 8,
            )  # fmt: skip
    return q, scale, zero_point


def quantize_int8(x: Tensor, group_size: int = 0, strict: bool = False) -> tuple[Tensor, Tensor]:
    return quantize_rows("quantize_int8", x, group_size, False, strict)[:2]


def quantize_int8_asymmetric(x: Tensor, strict: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows("quantize_int8_asymmetric", x, 0, True, strict)


def quantize_int8_static(
    x: Tensor,
    scale: float,
    zero_point: int = 0,
    dtype: torch.dtype = torch.int8,
    strict: bool = False,
) -> Tensor:
    op = "quantize_int8_static"
    checks.require_floating(op, "x", x)
    checks.require(
        dtype in (torch.int8, torch.uint8), op, f"dtype must be int8 or uint8, got {checks.name(dtype)}"
    )
    inverse = checks.require_scale(op, "scale", scale)
    low, high = (-127, 127) if dtype == torch.int8 else (0, 255)
    checks.require(
        (-128 if low else 0) <= zero_point <= high,
        op,
        f"zero_point must be a value of dtype, got {zero_point}",
    )
    q = torch.empty_like(x, dtype=dtype)
    if x.numel():
        if x.stride() != q.stride():  # only dense tensors keep their order
            x = torch.empty_like(q, dtype=x.dtype).copy_(x)
        block = 2048
        with findings_of(op, x.device, strict) as findings:
            launch(
                _static, (triton.cdiv(x.numel(), block),),
                x, q, findings, x.numel(), inverse, zero_point, on=x, LOW=low, HIGH=high, BLOCK=block,
            )  # fmt: skip
    return q


def _rows_ahead(x: str, size: int, asymmetric: bool, units: int, num_warps: int):
    arguments = {
        "x": x, "q": "*i8", "scale": "*fp32", "zero_point": "*i32" if asymmetric else None,
        "findings": "*i64", "units": "i32", "groups": "i32", "size": "i32:16", "ld_x": "i32:16",
        "ASYMMETRIC": asymmetric, "WHOLE": size <= _TILE, "UNITS": units, "BLOCK": min(size, _TILE),
    }  # fmt: skip
    return ahead(_rows, arguments, num_warps=num_warps, wide_loads=True)


AOT = [
    _rows_ahead("*fp16", 4096, False, 1, 8),
    _rows_ahead("*bf16", 1024, True, 1, 4),
    _rows_ahead("*fp32", 16384, False, 1, 8),
    _rows_ahead("*fp16", 64, False, 16, 4),
    ahead(
        _static,
        {
            "x": "*fp16", "q": "*u8", "findings": "*i64", "count": "i32:16", "inverse": "fp32",
            "zero_point": "i32", "LOW": 0, "HIGH": 255, "BLOCK": 2048,
        },
        wide_loads=True,
    ),
]  # fmt: skip
