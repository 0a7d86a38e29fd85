"""From codes, scales and zero points to the layouts of our kernels, without rounding anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.errors import FormatError
from narrowcast.formats import GroupedWeight, pack_int4

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def unpack(words: Tensor, bits: int, count: int, name: str) -> Tensor:
    """int32 [rows, W] -> uint8 codes [rows, count]; code i fills bits i * bits ... of the row, lowest first.

    Codes may straddle words. Raises FormatError when W is not what ``count`` codes need.
    """
    needed = -(-count * bits // 32)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != needed:
        raise FormatError(
            f"{name} must be int32 [rows, {needed}] for {count} codes of {bits} bits, "
            f"got {str(words.dtype).removeprefix('torch.')} {list(words.shape)}"
        )
    raw = words.reshape(-1).view(torch.uint8).view(words.shape[0], 4 * needed)
    if bits == 8:
        return raw[:, :count]
    if 8 % bits == 0:
        parts = [(raw >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(1)[:, :count]
    at = torch.arange(count) * bits
    padded = torch.nn.functional.pad(raw, (0, 1)).to(torch.int32)
    pair = padded[:, at // 8] | padded[:, at // 8 + 1] << 8
    return ((pair >> (at % 8)) & ((1 << bits) - 1)).to(torch.uint8)


def check(tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], name: str) -> Tensor:
    """The tensor, if it has one of the types and the shape. Raises FormatError."""
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise FormatError(
            f"{name} must be {kinds} {list(shape)}, got {str(tensor.dtype).removeprefix('torch.')} "
            f"{list(tensor.shape)}"
        )
    return tensor


def group_size(columns: int, groups: int, wanted: int, name: str) -> int:
    """The size that makes ``groups`` of ``columns``: the one that the settings name, or the exact quotient.

    wanted: -1 is one group. Raises FormatError when neither fits.
    """
    if wanted > 0 and -(-columns // wanted) == groups:
        return wanted
    if groups > 0 and columns % groups == 0 and columns > 0:
        return columns // groups
    raise FormatError(f"{name}: {groups} groups do not divide {columns} inputs")


def with_zeros(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | int,
    bits: int,
    group_size: int,
    columns: Tensor | None = None,
) -> GroupedWeight:
    """``w[n, k] = (codes[n, k] - zero[n, k // group_size]) * scale[n, k // group_size]``.

    codes: integers [N, K] of ``bits`` bits, signed or not; scale: [N, ceil(K / group_size)], floating point;
    zero: integers of the shape of scale, or one for all. columns: as in :class:`GroupedWeight`.

    Codes minus zeros are kept where they fit (no offset); otherwise the zero becomes an offset -zero * scale in
    float32. Our kernels round code * scale and the sum apart: both are exact for scales of up to 16 digits, all
    float16 and bfloat16. With a longer float32 scale 4-bit codes take 8 bits, minus their zeros; only 8-bit
    codes whose zeros do not fit lose a last bit then.
    """
    codes, scale, group_size, index = _regroup(codes.to(torch.int16), scale, group_size)
    if isinstance(zero, Tensor):
        zero = zero.to(torch.int16)[:, index]
        shifted = codes - zero.repeat_interleave(group_size, 1)
    else:
        shifted = codes - zero
    low, high = _range(shifted)
    if bits <= 4 and group_size % 2 == 0 and _short(scale):
        if low >= -8 and high <= 7:
            return _make(4, group_size, shifted + 8, scale, None, columns)
        centre = 8 if _range(codes)[0] < 0 else 0
        offset = (-(zero + centre) * scale.float()).expand_as(scale)
        return _make(4, group_size, codes + centre, scale, offset, columns)
    if low >= -128 and high <= 127:
        return _make(8, group_size, shifted, scale, None, columns)
    centre = 128 if _range(codes)[1] > 127 else 0
    offset = (centre - zero) * scale.float()
    return _make(8, group_size, codes - centre, scale, offset.expand_as(scale), columns)


def with_minima(
    codes: Tensor, scale: Tensor, minimum: Tensor, bits: int, group_size: int, centre: int = 0
) -> GroupedWeight:
    """``w[n, k] = (codes[n, k] - centre) * scale + minimum``, both per group and in floating point.

    Four-bit codes keep 4 bits if ``minimum - centre * scale`` is exact in float32, otherwise they take 8.
    """
    codes, scale, group_size, index = _regroup(codes.to(torch.int16), scale, group_size)
    minimum = minimum.float()[:, index]
    if bits <= 4 and group_size % 2 == 0:
        offset = minimum.double() - centre * scale.double()
        if bool((offset.float().double() == offset).all()):
            return _make(4, group_size, codes, scale, offset.float(), None)
    low, high = _range(codes - centre)
    if low >= -128 and high <= 127:
        return _make(8, group_size, codes - centre, scale, minimum, None)
    offset = (minimum.double() - (centre - 128) * scale.double()).float()
    return _make(8, group_size, codes - 128, scale, offset, None)


def sorted_columns(groups: Tensor, count: int, group_size: int, name: str) -> Tensor | None:
    """The order of columns in which every group of ``g_idx`` is a run of ``group_size``, or None if it is so.

    groups: int32 [K], the group of each column. The order is stable. Raises FormatError when a column names a
    group that is not there, or a group has another size.
    """
    groups = groups.to(torch.int64)
    columns = groups.numel()
    if columns and (int(groups.min()) < 0 or int(groups.max()) >= count):
        raise FormatError(f"{name} must hold groups below {count}")
    regular = torch.arange(columns) // group_size
    if torch.equal(groups, regular):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], regular):
        raise FormatError(f"{name} must give every group {group_size} columns")
    return order


def _range(codes: Tensor) -> tuple[int, int]:
    if codes.numel() == 0:
        return 0, 0
    low, high = torch.aminmax(codes)
    return int(low), int(high)


def _regroup(codes: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Groups that divide K: a last, shorter group makes all of them as small as need be."""
    columns = codes.shape[1]
    size = group_size if columns % group_size == 0 else math.gcd(group_size, columns)
    index = torch.arange(columns // size) * size // group_size
    scale = scale if scale.dtype in (torch.float16, torch.float32) else scale.float()
    return codes, scale[:, index], size, index


def _short(scale: Tensor) -> bool:
    """Whether products of 8-bit integers by the scales are exact in float32."""
    return scale.dtype == torch.float16 or not bool((scale.contiguous().view(torch.int32) & 0xFF).any())


def _make(
    bits: int, group_size: int, codes: Tensor, scale: Tensor, offset: Tensor | None, columns: Tensor | None
) -> GroupedWeight:
    packed = pack_int4(codes.to(torch.uint8)) if bits == 4 else codes.to(torch.int8).view(torch.uint8)
    if offset is not None:
        scale, offset = scale.float(), offset.contiguous()
    return GroupedWeight(bits, group_size, packed.contiguous(), scale.contiguous(), offset, columns)
