"""Quantised numbers back to floating point: int8 tensors, grouped int4 / int8 weights, GGUF blocks."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.narrowcast


def dequantize_int8(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    group_size: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``x = float(q - zero_point) * scale``, what ``quantize_int8`` wrote.

    q: int8 or uint8 [..., K].
    scale: float32 [...] (one per row), [..., K / group_size] when ``group_size`` > 0, or a scalar.
    zero_point: int32 of the shape of scale, or None for 0. The difference is taken in int32.
    Returns [..., K] in float32, float16 or bfloat16; with one scale for all laid out as a dense q is.

    Raises RuntimeError naming the argument.
    """
    return _ops.dequantize_int8(q, scale, zero_point, group_size, out_dtype)


def dequantize_groups(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    group_size: int,
    bits: int,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``w[n, k] = q[n, k] * scale[n, k // group_size] + offset[n, k // group_size]``.

    The arguments are those of :class:`narrowcast.formats.GroupedWeight`. Returns [N, K].

    Raises RuntimeError naming the argument.
    """
    return _ops.dequantize_groups(packed, scale, offset, group_size, bits, out_dtype)


def dequantize_gguf(blocks: Tensor, type: str, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of a GGUF file to floating point, bit for bit what the format defines.

    blocks: uint8 [..., bytes of a row], at any byte offset.
    type: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K.
    Returns [..., elements of a row] in float32, float16 or bfloat16.

    Raises RuntimeError for another type or a row that cuts a block. Layout: ggml-common.h of ggml.
    """
    return _ops.dequantize_gguf(blocks, type, out_dtype)
