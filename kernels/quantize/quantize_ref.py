"""The truth for quantize_*: float32 arithmetic, each operation rounded once, as the contract says."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor | int, low: int, high: int) -> Tensor:
    inverse = torch.ones_like(scale) / scale
    rounded = torch.nan_to_num(x * inverse, nan=0.0).clamp(-1024, 1024).round()
    return (rounded + zero_point).clamp(low, high)


def quantize_int8(x: Tensor, group_size: int = 0) -> tuple[Tensor, Tensor]:
    rows = x.float().unflatten(-1, (-1, group_size)) if group_size else x.float().unsqueeze(-2)
    finite = torch.where(rows.isfinite(), rows, 0.0)
    scale = finite.abs().amax(-1) / 127
    scale = torch.where(scale >= _SMALLEST_NORMAL, scale, 1.0)
    q = _codes(rows, scale.unsqueeze(-1), 0, -127, 127).to(torch.int8).reshape(x.shape)
    return q, scale if group_size else scale.squeeze(-1)


def quantize_int8_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float()
    finite = torch.where(x.isfinite(), x, 0.0)
    low = finite.amin(-1, keepdim=True).clamp(max=0)
    high = finite.amax(-1, keepdim=True).clamp(min=0)
    scale = high / 255 - low / 255
    scale = torch.where(scale >= _SMALLEST_NORMAL, scale, 1.0)
    zero_point = (-128 - low * (1 / scale)).round()
    q = _codes(x, scale, zero_point, -128, 127).to(torch.int8)
    return q, scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


def quantize_int8_static(
    x: Tensor, scale: float, zero_point: int = 0, dtype: torch.dtype = torch.int8
) -> Tensor:
    low, high = (-127, 127) if dtype == torch.int8 else (0, 255)
    return _codes(x.float(), torch.tensor(scale), zero_point, low, high).to(dtype)
