"""The truth for dequantize_*: plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize_groups(
    packed: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, bits: int,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    if bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    else:
        codes = packed.view(torch.int8)
    scale = scale.float()
    if offset is None:
        offset = -8 * scale if bits == 4 else torch.zeros_like(scale)
    spread = lambda t: t.float().repeat_interleave(group_size, dim=1)  # noqa: E731
    return (codes.float() * spread(scale) + spread(offset)).to(out_dtype)
