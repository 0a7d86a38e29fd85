"""Norms over the last dimension, alone or fused with the residual sum and the int8 quantiser.

In all of them x is float32, float16 or bfloat16 [..., K], computed in float32; residual has the shape
and dtype of x; weight and bias are [K] in any of the three dtypes. ``sum`` is x + residual, and the
norm is taken from it before it is rounded. The ``_int8`` forms return what ``quantize_int8`` makes of
the float32 result: q int8 [..., K], scale float32 [...], or [..., K / group_size]. Every function
raises RuntimeError naming the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.narrowcast


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich, arXiv 1910.07467)."""
    return _ops.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(sum), sum)``."""
    return _ops.add_rms_norm(x, residual, weight, eps)


def rms_norm_int8(x: Tensor, weight: Tensor, eps: float, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """``quantize_int8(rms_norm(x))``: (q, scale)."""
    return _ops.rms_norm_int8(x, weight, eps, group_size)


def add_rms_norm_int8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_size: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize_int8(rms_norm(sum))`` and the sum: (q, scale, sum)."""
    return _ops.add_rms_norm_int8(x, residual, weight, eps, group_size)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` (Ba et al., arXiv 1607.06450)."""
    return _ops.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``(layer_norm(sum), sum)``."""
    return _ops.add_layer_norm(x, residual, weight, bias, eps)


def layer_norm_int8(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """``quantize_int8(layer_norm(x))``: (q, scale)."""
    return _ops.layer_norm_int8(x, weight, bias, eps, group_size)


def add_layer_norm_int8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = layer_norm(sum)`` both quantised and as it is: (q, scale, y), the post-norm encoder's pair."""
    return _ops.add_layer_norm_int8(x, residual, weight, bias, eps, group_size)
