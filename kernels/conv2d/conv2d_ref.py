"""The truth for conv2d, in float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..linear_int8.linear_int8_ref import epilogue


def evenly_padded(x: Tensor, padding) -> tuple[Tensor, list[int]]:
    """x with what is more at one end than at the other, and the padding that is left for both ends."""
    padding = list(padding)
    if len(padding) != 4:
        return x, padding
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom)), [0, 0]


def conv2d(
    x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
    activation="none", residual=None, post_activation="none",
) -> Tensor:  # fmt: skip
    x, padding = evenly_padded(x.double(), padding)
    y = F.conv2d(x, weight.double(), None, stride, padding, dilation, groups)
    bias = None if bias is None else bias.reshape(-1, 1, 1)
    return epilogue(y, bias, activation, residual, post_activation)
