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


def dequantize_int8(
    q: Tensor, scale: Tensor, zero_point: Tensor | None = None, group_size: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    spread = lambda t: t.repeat_interleave(group_size, -1) if group_size else t.unsqueeze(-1)  # noqa: E731
    q = q.int() if zero_point is None else q.int() - spread(zero_point)
    return (q.float() * spread(scale)).to(out_dtype)


def dequantize_gguf(blocks: Tensor, type: str, out_dtype: torch.dtype = torch.float32) -> Tensor:
    import gguf  # the format's own package is the truth here

    rows = blocks.reshape(-1, blocks.shape[-1]).contiguous().numpy()
    y = torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type]))
    return y.reshape(*blocks.shape[:-1], -1).to(out_dtype)
