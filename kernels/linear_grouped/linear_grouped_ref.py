"""The truth for linear_grouped: exact integers and float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def quantize_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """int8 values [..., K / block, block] and float32 scales [..., K / block, 1]."""
    x = x.float().unflatten(-1, (-1, block))
    finite = torch.where(x.isfinite(), x, 0.0)
    absmax = finite.abs().amax(-1, keepdim=True)
    scale = absmax / 127
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
    q = (x * (1 / scale)).nan_to_num(0.0, math.inf, -math.inf).clamp(-127, 127).round()
    return q, scale


def round_rows(x: Tensor) -> Tensor:
    """x as float64, each row as the int16 codes times the scale that the CPU multiplies with."""
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    scale = absmax / 32639
    scale = torch.where((scale >= torch.finfo(torch.float32).tiny) | scale.isnan(), scale, 1.0)
    q = (x * (1 / scale)).clamp(-32639, 32639).round()
    return torch.where(absmax.isfinite(), q.double() * scale.double(), math.nan)


def linear_grouped(
    x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, bits: int,
    bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None,
    *, activation_bits: int = 16, post_activation: str = "none",
) -> Tensor:  # fmt: skip
    """In float64; the caller rounds: the result, and x by `round_rows` where that is what is asked."""
    if bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).double()
        codes = codes if offset is not None else codes - 8
    else:
        codes = packed.view(torch.int8).double()
    spread = lambda t: t.double().repeat_interleave(group_size, dim=1)  # noqa: E731
    w = codes * spread(scale)
    if offset is not None:
        w = w + spread(offset)
    if activation_bits == 8:
        q, x_scale = quantize_blocks(x, math.gcd(group_size, 128))
        x = (q.double() * x_scale.double()).flatten(-2)
    y = x.double() @ w.T
    if bias is not None:
        y = y + bias.double()
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.double()
    return ACTIVATIONS[post_activation](y)
