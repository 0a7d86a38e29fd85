"""The truth for rope, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    steps, half = torch.arange(x.shape[2]), cos.shape[1]
    if positions is None:
        positions = steps.expand(x.shape[0], -1)
    elif positions.dim() == 1:
        positions = positions[:, None].long() + steps
    c, s = (table.double()[positions.long()].unsqueeze(1) for table in (cos, sin))  # [B, 1, S, R / 2]
    turned, rest = x.double().split([2 * half, x.shape[3] - 2 * half], -1)
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = (a * c - b * s, b * c + a * s)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)
