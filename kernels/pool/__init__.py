"""Pooling of int8 images [N, C, H, W], read in any strides (copied once unless channels-last)."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.narrowcast


def max_pool2d_int8(
    x_q: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int] = (0, 0),
    dilation: list[int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    """The largest code in each window, with the scale and zero point of x_q; padding never wins.

    x_q int8 or uint8 [N, C, H, W]; the window's arguments as in ``torch.nn.functional.max_pool2d``.
    Returns the dtype of x_q in channels-last. Raises RuntimeError naming the argument.
    """
    return _ops.max_pool2d_int8(x_q, kernel_size, stride, padding, dilation, ceil_mode)


def avg_pool2d_int8(
    x_q: Tensor,
    x_scale: float,
    x_zero_point: int,
    kernel_size: list[int] = (),
    stride: list[int] = (),
    padding: list[int] = (0, 0),
    out_scale: float = 0.0,
    out_zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = sum(x_q - x_zero_point) * (x_scale / count)`` over the pixels of each window inside the image.

    Padding is not counted. An empty kernel_size takes the whole image. With out_scale 0 the result is
    floating (float32 unless out_dtype says otherwise), else uint8 or int8 codes
    ``round(y / out_scale) + out_zero_point``. Channels-last. Raises RuntimeError naming the argument.
    """
    return _ops.avg_pool2d_int8(
        x_q, x_scale, x_zero_point, kernel_size, stride, padding, out_scale, out_zero_point, out_dtype
    )
