"""The truth for linear_int8 and its forms: exact integers, then float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": lambda x: x.clamp(0, 6),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) * (1 / 6),  # in the order of activation.h
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def accumulate(x_q: Tensor, w_q: Tensor, x_zero_point: Tensor | None, group_size: int) -> Tensor:
    """Exact sums, one per group: [..., N, groups] as float64, which holds them exactly."""
    x = x_q.double()
    if x_zero_point is not None:
        x = x - x_zero_point.reshape(*x.shape[:-1], 1)
    groups = x.shape[-1] // group_size if group_size else 1
    x, w = x.unflatten(-1, (groups, -1)), w_q.double().unflatten(-1, (groups, -1))
    return torch.einsum("...gk,ngk->...ng", x, w)


def epilogue(y, bias, activation, residual, post_activation) -> Tensor:
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return ACTIVATIONS[post_activation](y)


def linear_int8(
    x_q, x_scale, w_q, w_scale, bias=None, activation="none", residual=None, x_zero_point=None,
    *, group_size=0, post_activation="none", dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """In float64; with dtype=torch.float32 and no groups, the bits that every kernel must give."""
    acc = accumulate(x_q, w_q, x_zero_point, group_size).to(dtype)
    scale = x_scale.to(dtype)
    if group_size:
        y = (acc * scale.unsqueeze(-2)).sum(-1)
    else:
        y = acc[..., 0] * (scale if scale.numel() == 1 else scale.reshape(*x_q.shape[:-1], 1))
    return epilogue(y * w_scale.to(dtype), bias, activation, residual, post_activation)


def requantise(y: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    low, high = (-127, 127) if dtype == torch.int8 else (0, 255)
    inverse = 1 / torch.tensor(scale, dtype=torch.float32)
    q = torch.nan_to_num(y.float() * inverse, nan=0.0)
    return (q.round() + zero_point).clamp(low, high).to(dtype)
