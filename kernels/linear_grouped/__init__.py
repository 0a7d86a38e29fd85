"""Linear layers with int4 or int8 weights in groups along K."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.limits import one_of

_ops = torch.ops.narrowcast

LIMITS = {"cuda": (one_of("activation_bits", 16),), "triton": (one_of("activation_bits", 8, 16),)}


def linear_grouped(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    group_size: int,
    bits: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    activation_bits: int = 16,
    post_activation: str = "none",
) -> Tensor:
    """``y = post_activation(activation(x W^T + bias) + residual)``, W dequantised on the way.

    ``W[n, k] = q[n, k] * scale[n, k // group_size] + offset[n, k // group_size]``; without offset,
    4-bit codes are centred on 8 and 8-bit codes on 0.

    x: float32, float16 or bfloat16 [..., K].
    packed: uint8 [N, K * bits / 8]; 4 bits: low nibble at even k; 8 bits: int8 values.
    scale, offset: float32 or float16 [N, K / group_size]; group_size is a multiple of 32.
    bias: floating point [N]; residual: floating point [..., N].
    activation_bits: with how many bits an element of x enters the products. 8: symmetric int8 per
        gcd(group_size, 128) elements, quantised inside. 16: 16 bits, on a CPU symmetric int16 per row,
        whatever the dtype of x, which is closer than float16 would be; a row with a NaN or an infinity
        gives NaN. Both multiply integers, exactly. 32: float32 products and sums.
    out_dtype: of x unless said.
    Returns [..., N].

    Weights used more than once are best held by :class:`narrowcast.nn_grouped.LinearGrouped`, which
    keeps them in the order the kernels read.

    Raises RuntimeError naming the argument.
    """
    return _ops.linear_grouped(
        x, packed, scale, offset, group_size, bits, bias, activation, residual, out_dtype,
        activation_bits=activation_bits, post_activation=post_activation,
    )  # fmt: skip
