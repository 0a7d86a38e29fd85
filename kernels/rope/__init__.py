"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.narrowcast


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """``(a, b) -> (a cos - b sin, b cos + a sin)`` on the first R elements of each head; the rest passes.

    x: float32, float16 or bfloat16 [B, H, S, D], any strides.
    cos, sin: [positions, R / 2], of one floating dtype, R <= D.
    positions: None for 0 .. S - 1, int32 or int64 [B] for the first of each sequence, [B, S] for each.
    interleaved: pairs are (x[2i], x[2i + 1]); else (x[i], x[i + R / 2]).
    Returns [B, H, S, D] like x, contiguous.

    Raises RuntimeError naming the argument, also for a position outside the tables.
    Su et al., arXiv 2104.09864.
    """
    return _ops.rope(x, cos, sin, positions, interleaved)
