"""The truth for conv2d_int8: exact integers, then the contract's float32 operations one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowcast.kernels.conv2d.conv2d_ref import evenly_padded
from narrowcast.kernels.linear_int8.linear_int8_ref import ACTIVATIONS


def accumulate(x_q, x_zero_point, w_q, stride, padding, dilation, groups) -> Tensor:
    """Exact sums [N, O, OH, OW], in float64 (which holds them)."""
    # Padding with 0 is padding with the zero point.
    x, padding = evenly_padded(x_q.double() - x_zero_point, padding)
    return F.conv2d(x, w_q.double(), None, stride, padding, dilation, groups)


def conv2d_int8(
    x_q, x_scale, x_zero_point, w_q, w_scale, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
    activation="none", residual=None, residual_scale=1.0, residual_zero_point=0, post_activation="none",
    out_scale=0.0, out_zero_point=0, out_dtype=None, *, dtype=torch.float32,
) -> Tensor:  # fmt: skip
    """dtype=torch.float32: the bits every kernel gives; torch.float64: the truth for transcendental epilogues."""
    number = lambda v: torch.tensor(v, dtype=torch.float32).to(dtype)  # noqa: E731
    acc = accumulate(x_q, x_zero_point, w_q, stride, padding, dilation, groups).to(dtype)
    scale = (torch.tensor(x_scale, dtype=torch.float32) * w_scale).to(dtype).reshape(-1, 1, 1)
    y = acc * scale
    if bias is not None:
        y = y + bias.to(dtype).reshape(-1, 1, 1)
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        zero = 0 if residual.is_floating_point() else residual_zero_point
        y = y + (residual.to(dtype) - zero) * number(residual_scale)
    y = ACTIVATIONS[post_activation](y)
    if out_scale == 0.0:
        return y if dtype == torch.float64 else y.to(out_dtype or torch.float32)
    out_dtype = out_dtype or torch.uint8
    low, high = (-127, 127) if out_dtype == torch.int8 else (0, 255)
    q = torch.nan_to_num(y * (1 / torch.tensor(out_scale, dtype=torch.float32)).to(dtype), nan=0.0)
    return (q.clamp(-1024, 1024).round() + out_zero_point).clamp(low, high).to(out_dtype)
