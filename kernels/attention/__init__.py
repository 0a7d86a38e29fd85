"""Softmax attention over whole sequences: grouped heads, masks, biases, packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.limits import dtypes, last_size

_ops = torch.ops.narrowcast

LIMITS = {
    "cuda": (dtypes("q", torch.float16, torch.bfloat16), last_size("q", 256), last_size("v", 256)),
    "triton": (last_size("q", 256), last_size("v", 256)),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``out = softmax(cap(scale * q k^T) + bias) v`` with ``cap(s) = softcap * tanh(s / softcap)``.

    q: [B, Hq, Sq, D]; k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv]; Hkv divides Hq. float32, float16 or
        bfloat16, all the same. Read where they lie when the last stride is 1, else copied.
    bias: float32, float16 or bfloat16, broadcast to [B, Hq, Sq, Sk] without being materialised.
    scale: 1 / sqrt(D) unless given.
    causal: query i stands at position p = i + Sk - Sq and sees the keys j <= p.
    window: w > 0 leaves the keys p - w < j; without causal also j < p + w.
    softcap: 0 for none.
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1], the first row of each sequence in the packed form
        q [Tq, Hq, D], k, v [Tk, Hkv, D]. No bias then.
    sinks: float32 [Hq], one more logit per head that joins the denominator only.
    Returns [B, Hq, Sq, Dv] (or [Tq, Hq, Dv]) in the dtype of q, and with ``return_lse`` also the
    logarithm of the denominator, float32 [B, Hq, Sq]. A row that sees no key is 0, its lse that of
    the sink, or -inf. Softmax and sums are float32; for bfloat16 inputs the weights may be
    rounded to bfloat16, where the CPU multiplies those.

    Raises RuntimeError naming the argument. Method: Dao et al. 2022, arXiv 2205.14135.
    """
    op = _ops.attention_lse if return_lse else _ops.attention
    return op(q, k, v, bias, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k, sinks)
