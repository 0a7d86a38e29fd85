"""The truth for attention_decode: each sequence's cache written out, then attention in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.kernels.attention.attention_ref import attention
from narrowcast.kernels.kv_append.kv_append_ref import from_nibbles


def attention_decode(
    q, k_cache, v_cache, lengths, k_scale=None, v_scale=None, scale=None, window=0, softcap=0.0,
    block_table=None, sinks=None,
) -> Tensor:  # fmt: skip
    k, v = k_cache.double(), v_cache.double()
    if k_cache.dtype == torch.uint8:
        k, v = from_nibbles(k_cache, k_scale), from_nibbles(v_cache, v_scale)
    elif k_scale is not None:
        k, v = k * k_scale.double()[..., None], v * v_scale.double()[..., None]
    out = []
    for b, length in enumerate(lengths.tolist()):
        kb, vb = (
            t[b] if block_table is None else t[block_table[b].long()].transpose(0, 1).flatten(1, 2)
            for t in (k, v)
        )
        kb, vb = kb[None, :, :length], vb[None, :, :length]
        out.append(attention(q[b : b + 1], kb, vb, None, scale, True, window, softcap, sinks=sinks))
    return torch.cat(out)
