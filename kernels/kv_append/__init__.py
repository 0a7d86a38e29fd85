"""New keys and values into a KV cache, turned, converted and quantised on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.limits import dtypes, last_size

_ops = torch.ops.narrowcast

_CACHES = dtypes("k_cache", torch.float32, torch.float16, torch.bfloat16, torch.int8)
LIMITS = {"triton": (_CACHES, last_size("k", 8192))}


def kv_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    block_table: Tensor | None = None,
    k_shift: Tensor | None = None,
) -> None:
    """``k_cache[b, :, start[b] + s] = rope(k)[b, :, s]`` and the same for v without rope, in place.

    k_cache, v_cache: [B, Hkv, C, D] float32, float16, bfloat16 or int8, adjacent in the last
        dimension; with block_table pages [P, Hkv, page, D]. uint8 [.., D / 2]: 4-bit codes of rows
        rotated by a Hadamard matrix, D = 32, 64, 128 or 256; only :func:`attention_decode` reads them.
    k, v: [B, Hkv, S, D] float32, float16 or bfloat16.
    start: int32 [B], 0 .. C - S each: the tokens that a sequence holds already.
    k_scale, v_scale: float32 [B, Hkv, C] (pages: [P, Hkv, page]), written for int8 caches: the
        largest magnitude of a token and head / 127, 1 for a row of zeros. For uint8 caches bfloat16
        [.., D / 16]: step and minimum of each group of 32.
    cos, sin: float32 [positions, R / 2], positions start[b] + s; absent for no rope. ``interleaved``
        pairs x[2 i], x[2 i + 1] instead of x[i], x[i + R / 2].
    block_table: int32 [B, pages], the page of each run of ``page`` slots.
    k_shift: float32 [Hkv, D], uint8 caches only: taken from k behind the rope. A softmax over the scores
        does not see it, so what all keys have in common need not be rounded.

    Raises RuntimeError naming the argument; nothing has been written then.
    """
    _ops.kv_append(
        k_cache, v_cache, k, v, start, k_scale, v_scale, cos, sin, interleaved, block_table, k_shift
    )
