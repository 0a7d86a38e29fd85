"""The truth for the int8 pools: exact integers, then float32 in the order of the contract."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def max_pool2d_int8(x_q, kernel_size, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False) -> Tensor:
    y = F.max_pool2d(x_q.double(), kernel_size, stride, padding, dilation, ceil_mode)
    return y.clamp(-128 if x_q.dtype == torch.int8 else 0).to(x_q.dtype)


def avg_pool2d_int8(x_q, x_scale, x_zero_point, kernel_size=(), stride=(), padding=(0, 0)) -> Tensor:
    """The float32 result before it is stored."""
    kernel = list(kernel_size or x_q.shape[2:])
    options = {"stride": stride or kernel, "padding": padding, "divisor_override": 1}
    total = F.avg_pool2d(x_q.double() - x_zero_point, kernel, **options)
    count = F.avg_pool2d(torch.ones_like(x_q[:1, :1], dtype=torch.float64), kernel, **options)
    return total.float() * (torch.tensor(x_scale) / count.float())
