"""The truth for kv_append: one token and head at a time."""

from __future__ import annotations

from torch import Tensor

from narrowcast.kernels.quantize.quantize_ref import quantize_int8
from narrowcast.kernels.rope.rope_ref import rope


def kv_append(
    k_cache, v_cache, k, v, start, k_scale=None, v_scale=None, cos=None, sin=None, interleaved=False,
    block_table=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """New caches (and scales), the arguments untouched."""
    turned = k if cos is None else rope(k, cos, sin, start, interleaved)
    results = []
    for cache, scale, x in ((k_cache, k_scale, turned), (v_cache, v_scale, v)):
        cache, scale = cache.clone(), None if scale is None else scale.clone()
        for b in range(k.shape[0]):
            for s in range(k.shape[2]):
                at = (b, slice(None), int(start[b]) + s)
                if block_table is not None:
                    page = cache.shape[2]
                    at = (int(block_table[b, at[2] // page]), slice(None), at[2] % page)
                if scale is None:
                    cache[at] = x[b, :, s].to(cache.dtype)
                else:
                    cache[at], scale[at] = quantize_int8(x[b, :, s].float())
        results += [cache] if scale is None else [cache, scale]
    return tuple(results)
