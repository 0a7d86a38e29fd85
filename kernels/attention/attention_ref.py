"""The truth for attention, attention_decode and attention_int8: float64, every score materialised."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(sq: int, sk: int, causal: bool, window: int) -> Tensor:
    """bool [Sq, Sk]: which keys a query sees; query i stands at position i + Sk - Sq."""
    ago = torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)[None]
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        seen &= ago >= 0
    if window:
        seen &= ago < window
        if not causal:
            seen &= -ago < window
    return seen


def attention_lse(
    q, k, v, bias=None, scale=None, causal=False, window=0, softcap=0.0,
    cu_seqlens_q=None, cu_seqlens_k=None, sinks=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if cu_seqlens_q is not None:
        spans = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:],
                    cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:], strict=False)  # fmt: skip
        out, lse = q.new_empty((*q.shape[:-1], v.shape[-1])).double(), q.new_empty(q.shape[:-1]).double()
        for q0, q1, k0, k1 in spans:
            parts = (t.transpose(0, 1)[None] for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
            o, m = attention_lse(*parts, bias, scale, causal, window, softcap, sinks=sinks)
            out[q0:q1], lse[q0:q1] = o[0].transpose(0, 1), m[0].transpose(0, 1)
        return out, lse
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double()
    s = s.masked_fill(~visible(q.shape[2], k.shape[2], causal, window), -torch.inf)
    column = torch.full((*s.shape[:-1], 1), -torch.inf, dtype=torch.float64)
    if sinks is not None:
        column[:] = sinks.double()[:, None, None]
    s = torch.cat((s, column), -1)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse.where(lse > -torch.inf, 0)[..., None])[..., :-1]
    return p @ v, lse


def attention(*args, **kwargs) -> Tensor:
    return attention_lse(*args, **kwargs)[0]
