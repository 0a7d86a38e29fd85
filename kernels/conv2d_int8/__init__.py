"""Int8 convolution with exact int32 sums, and bias, activation, residual and requantisation inside."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.narrowcast


def conv2d_int8(
    x_q: Tensor,
    x_scale: float,
    x_zero_point: int,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    stride: list[int] = (1, 1),
    padding: list[int] = (0, 0),
    dilation: list[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    post_activation: str = "none",
    out_scale: float = 0.0,
    out_zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = post_activation(activation(acc * x_scale * w_scale + bias) + residual')``, acc exact.

    acc is the convolution of ``x_q - x_zero_point`` with w_q, residual' is
    ``(residual - residual_zero_point) * residual_scale``. x_q uint8 or int8 [N, C, H, W] in any strides
    (copied once unless channels-last); padding, (vertical, horizontal) or (top, left, bottom, right),
    counts as the zero point. w_q int8 [O, C / groups, height,
    width]; w_scale float32 [O] or [1]; bias float32 [O]; residual uint8, int8 or floating, of the shape of
    the result. With out_scale 0 the result is y (float32 unless out_dtype says otherwise), else uint8 or
    int8 codes ``round(y / out_scale) + out_zero_point``, rounded half to even and saturated. Returns
    [N, O, H', W'] in channels-last. Raises RuntimeError naming the argument.
    """
    return _ops.conv2d_int8(
        x_q, x_scale, x_zero_point, w_q, w_scale, bias, stride, padding, dilation, groups, activation,
        residual, residual_scale, residual_zero_point, post_activation, out_scale, out_zero_point, out_dtype,
    )  # fmt: skip
