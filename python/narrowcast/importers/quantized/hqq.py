"""HQQ: codes of a reshaped weight, packed by blocks of rows, with zero points in floating point.

``w = ((q - zero) * scale).reshape(shape)``; with axis 1 the weight is taken as rows of one group each, with axis 0
as columns of one group each.

=====  =====================================================================================
W_q    4, 2, 1 bits: uint8, block j of the rows in bits 8 - (j + 1) * bits; 8 bits: one a byte;
       3 bits: int32, block j of ten in bits 27 - 3 j, rows padded to a multiple of ten
scale  float [groups, 1] (axis 1) or [1, groups] (axis 0)
zero   float, like scale
shape  integers [2]: N, K; and single numbers: nbits, group_size, axis, packing ...
=====  =====================================================================================

With axis 0 a group runs down a column of the weight, which no kernel takes: such weights are read as floats.
Layout: the hqq package (core/bitpack.py, core/quantize.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight

from .checkpoint import Checkpoint, Settings
from .codes import FLOATS, check, with_minima, with_zeros

_PARTS = (
    "W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype",
    "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict",
    "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_BITS = (1, 2, 3, 4, 8)


def read(tensors: Checkpoint, settings: Settings) -> tuple[dict[str, GroupedWeight | Tensor], set[str]]:
    """Parameter name -> weight, and the names of the tensors that were read for them."""
    weights, used = {}, set()
    for name in tensors:
        if name.endswith(".W_q"):
            module = name.removesuffix(".W_q")
            weights[f"{module}.weight"] = _layer(tensors, module)
            used |= {f"{module}.{part}" for part in _PARTS}
    return weights, used


def _layer(tensors: Checkpoint, module: str) -> GroupedWeight | Tensor:
    for part in ("quant_scale", "quant_zero"):
        if f"{module}.{part}" in tensors and _number(tensors, f"{module}.{part}"):
            raise UnsupportedError(f"{module}: HQQ scales and zeros must not be quantised themselves")
    bits, axis = _number(tensors, f"{module}.nbits"), _number(tensors, f"{module}.axis")
    if bits not in _BITS or axis not in (0, 1):
        raise UnsupportedError(f"{module}: HQQ needs 1, 2, 3, 4 or 8 bits on axis 0 or 1, got {bits}, {axis}")
    shape = tensors.need(f"{module}.shape")
    shape = check(shape, (torch.int32, torch.int64), (2,), f"{module}.shape").tolist()
    scale, zero = tensors.need(f"{module}.scale"), tensors.need(f"{module}.zero")
    groups = scale.numel()
    if min(shape) < 1 or max(shape) > 1 << 31 or not groups or math.prod(shape) % groups:
        raise FormatError(f"{module}: {groups} groups do not divide the shape {shape}")
    check(scale, FLOATS, (groups, 1) if axis else (1, groups), f"{module}.scale")
    check(zero, FLOATS, tuple(scale.shape), f"{module}.zero")
    size = math.prod(shape) // groups
    sides = (groups, size) if axis else (size, groups)
    codes = _unpack(tensors[f"{module}.W_q"], bits, *sides, f"{module}.W_q")
    if axis == 0 or shape[1] % size:
        return ((codes.float() - zero.float()) * scale.float()).reshape(shape)
    codes, scale, zero = codes.view(shape), scale.view(shape[0], -1), zero.view(shape[0], -1).float()
    if bool((zero == zero.round()).all()) and bool((zero.abs() <= 255).all()):
        return with_zeros(codes, scale, zero.to(torch.int16), bits, size)
    # Exact for scales and zeros of 16 bits: the product has at most 22 digits. Codes of 8 bits are centred on 128,
    # which may round the last bit of their offset.
    return with_minima(codes, scale, -zero * scale.float(), bits, size)


def _number(tensors: Checkpoint, name: str) -> int:
    tensor = tensors.need(name)
    if tensor.numel() != 1 or tensor.is_floating_point():
        raise FormatError(f"{name} must be one integer")
    return int(tensor)


def _unpack(words: Tensor, bits: int, rows: int, columns: int, name: str) -> Tensor:
    """Codes uint8 [rows, columns]."""
    blocks, width = (10, 4) if bits == 3 else (8 // bits, 1)
    height = -(-rows // blocks)
    if bits != 3 and rows % blocks:
        raise FormatError(f"{name}: {rows} rows are no multiple of {blocks}")
    # Bytes that are kept in words of a floating type are the same bytes.
    raw = words.reshape(-1).view(torch.uint8)
    if raw.numel() != height * columns * width:
        raise FormatError(f"{name} has {raw.numel()} bytes, {height * columns * width} are needed")
    packed = raw.view(torch.int32 if width == 4 else torch.uint8).view(height, columns)
    top = bits * (blocks - 1)
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(top, -1, -bits)]
    return torch.cat(parts)[:rows].to(torch.uint8)
