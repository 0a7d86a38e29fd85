"""The truth for linear: float64."""

from __future__ import annotations

from torch import Tensor

from narrowcast.kernels.linear_int8.linear_int8_ref import epilogue


def linear(x, weight, bias=None, activation="none", residual=None, post_activation="none") -> Tensor:
    y = x.double() @ weight.double().T
    return epilogue(y, bias, activation, residual, post_activation)
