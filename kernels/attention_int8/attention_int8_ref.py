"""The truth for the integer part of attention_int8: the rule of attention_int8.h, then float64.

And how far from it the all-integer form (attention_int8_values_triton.py) may be.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from narrowcast.kernels.attention.attention_ref import attention


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 rows; NaN for the scale of a row that is not finite."""
    finite = x.isfinite().all(-1, keepdim=True)
    scale = x.abs().amax(-1, keepdim=True) / 127 if x.shape[-1] else x.new_ones((*x.shape[:-1], 1))
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    codes = torch.where(finite, (x * (1 / scale)).round().clamp(-127, 127), 0)
    return codes, torch.where(finite, scale, torch.nan)


def mean_of(k: Tensor) -> Tensor:
    """The float32 mean over dimension 2, rows added in order."""
    total = k.new_zeros((*k.shape[:2], 1, k.shape[3]))
    for row in torch.where(k.isfinite(), k, 0).unbind(2):
        total = total + row[:, :, None]
    mean = total / k.shape[2]
    return torch.where(mean.isfinite(), mean, 0)


def attention_int8(
    q, k, v, bias=None, scale=None, causal=False, window=0, softcap=0.0,
    cu_seqlens_q=None, cu_seqlens_k=None, sinks=None,
) -> Tensor:  # fmt: skip
    if cu_seqlens_q is not None:
        out = q.new_empty((*q.shape[:-1], v.shape[-1])).double()
        starts = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
        for (q0, k0), (q1, k1) in pairwise(starts):
            parts = (t.transpose(0, 1)[None] for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
            o = attention_int8(*parts, bias, scale, causal, window, softcap, sinks=sinks)
            out[q0:q1] = o[0].transpose(0, 1)
        return out
    scale = torch.tensor(max(q.shape[-1], 1) ** -0.5 if scale is None else scale, dtype=torch.float32)
    q, k = q.float() * scale, k.float()
    mean = mean_of(k)
    (qc, qs), (kc, ks) = quantize(q), quantize(k - mean)
    # The part of the mean rides along as one more column, with a key of 1.
    back = mean.double().repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    back = (q.double() * back).sum(-1, keepdim=True) * (softcap > 0 or sinks is not None)
    rows = torch.cat((qc.double() * qs.double(), back), -1)
    keys = kc.double() * ks.double()
    keys = torch.cat((keys, torch.ones_like(keys[..., :1]) if keys.shape[-1] else ks.double()), -1)
    return attention(rows, keys, v, bias, 1.0, causal, window, softcap, sinks=sinks)


def integer_values_bound(q, k, v, bias=None, **options) -> Tensor:
    """What 8-bit weights and values may add to an element of the output: sum over the keys j that a row sees of

        p_ij vs_j / 2  +  max_j (p_ij vs_j) / 510 * |v8_j|

    with p the softmax, vs_j and v8_j scale and codes of v. The maximum is over all keys, of which a tile has some.
    """
    v = v.float()
    scale = v.abs().amax(-1, keepdim=True) / 127
    scale = scale.clamp(min=2.0**-40 * scale.amax((-1, -2), keepdim=True)).clamp(
        min=torch.finfo(v.dtype).tiny
    )
    codes = (v / scale).round().abs()
    one_each = torch.eye(v.shape[2]).expand(*v.shape[:2], -1, -1)
    weights = attention_int8(q, k, one_each * scale, bias, **options)  # p_ij vs_j, for every i and j
    codes = codes.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    largest = weights.amax(-1, keepdim=True) / 510
    return weights.sum(-1, keepdim=True) / 2 + largest * ((weights > 0).double() @ codes)
