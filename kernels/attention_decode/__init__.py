"""Attention of new tokens over a KV cache: dense or paged, float, int8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.limits import dtype_like, dtypes, last_size

_ops = torch.ops.narrowcast

LIMITS = {
    "cuda": (
        dtypes("q", torch.float16, torch.bfloat16),
        dtype_like("k_cache", "q", torch.int8),
        last_size("q", 256),
    ),
    "triton": (
        dtypes("k_cache", torch.float32, torch.float16, torch.bfloat16, torch.int8),
        last_size("q", 256),
    ),
}


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``attention`` of q over the first ``lengths[b]`` entries of a cache, causal.

    q: [B, Hq, Sq, D] float32, float16 or bfloat16, the newest Sq tokens; the cache already holds
        their keys. Query s sees keys 0 .. lengths[b] - Sq + s, of these the last ``window`` if > 0.
    k_cache, v_cache: [B, Hkv, C, D] float32, float16, bfloat16 or int8; with block_table pages
        [P, Hkv, page, D]. Hkv divides Hq. uint8 [.., D / 2]: rotated 4-bit codes as ``kv_append`` writes them.
    lengths: int32 [B], Sq .. C each.
    k_scale, v_scale: float32 [B, Hkv, C] (pages: [P, Hkv, page]), only for int8 caches; bfloat16
        [.., D / 16] for uint8 caches.
    block_table: int32 [B, pages], the page of each run of ``page`` keys.
    scale, softcap, sinks: as in ``attention``.
    Returns [B, Hq, Sq, D] in the dtype of q; the same bits whatever the batch and thread count.

    Raises RuntimeError naming the argument, before anything is read, also for lengths and pages
    out of range.
    """
    return _ops.attention_decode(
        q, k_cache, v_cache, lengths, k_scale, v_scale, scale, window, softcap, block_table, sinks
    )
