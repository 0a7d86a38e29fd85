"""Floating-point convolution with bias, activation and residual inside."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.narrowcast


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: list[int] = (1, 1),
    padding: list[int] = (0, 0),
    dilation: list[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    post_activation: str = "none",
) -> Tensor:
    """``post_activation(activation(conv(x, weight) + bias) + residual)``, accumulated in float32.

    x [N, C, H, W] in any strides (copied once unless channels-last), float32, float16 or bfloat16; weight
    [O, C / groups, height, width] of the dtype of x; bias [O] and residual (the shape of the result, any
    strides) in any of the three dtypes. padding is (vertical, horizontal), or (top, left, bottom, right). Returns [N, O, H', W'] channels-last in the dtype of x. groups = C
    = O, the depthwise form, has a kernel of its own. Raises RuntimeError naming the argument.
    """
    return _ops.conv2d(
        x, weight, bias, stride, padding, dilation, groups, activation, residual, post_activation
    )
