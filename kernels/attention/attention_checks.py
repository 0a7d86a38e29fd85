"""Argument checks of attention's Python launchers: attention_checks.h in Python, with the same messages.

What cu_seqlens hold is not checked on a GPU, where reading it would make the host wait; kernels cut off
what lies outside of the tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.checks import FLOATING, describe, fail, name, require, require_device

#: Key numbers are int32 in the kernels; a window of this length hides nothing.
MOST_KEYS = 1 << 30
#: Elements between two rows, so that a tile's offsets stay within int32; rows further apart are copied.
MOST_STRIDE = 1 << 23


@dataclass
class Attention:
    """The arguments of one call. Strides are those of (batch, head, row); packed: batch strides are 0."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    sinks: Tensor | None
    batch: int
    heads: int
    kv_heads: int
    sq: int
    sk: int
    scale: float
    softcap: float
    window: int
    causal: bool

    @property
    def group(self) -> int:
        return self.heads // max(self.kv_heads, 1)

    @property
    def depth(self) -> int:
        return self.q.shape[-1]

    @property
    def v_depth(self) -> int:
        return self.v.shape[-1]

    def strides(self, t: Tensor) -> tuple[int, int, int]:
        """Of (batch, head, row) of q, k, v, a result like q, or its lse [..., row]."""
        packed = self.cu_q is not None
        return (0, t.stride(1), t.stride(0)) if packed else (t.stride(0), t.stride(1), t.stride(2))

    def bias_strides(self) -> tuple[int, ...]:
        """Of batch, head, query and key, 0 where broadcast."""
        if self.bias is None:
            return 0, 0, 0, 0
        return self.bias.expand(self.batch, self.heads, self.sq, self.sk).stride()


def dense_rows(t: Tensor) -> Tensor:
    """t, or a copy when its rows are not adjacent elements or lie too far apart."""
    if t.numel() == 0:
        return t
    far = any(s > MOST_STRIDE and n > 1 for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True))
    dense = t.shape[-1] == 1 or t.stride(-1) == 1
    return t if dense and not (far and t.numel() <= MOST_KEYS) else t.contiguous()


def require_rank(op: str, argument: str, t: Tensor, rank: int, form: str) -> None:
    if t.dtype not in FLOATING or t.dim() != rank:
        fail(op, f"{argument} must be float32, float16 or bfloat16 {form}, got {describe(t)}")


def require_vector(op: str, argument: str, t: Tensor, dtype: torch.dtype, count: int, device) -> Tensor:
    size = "B + 1" if count < 0 else str(count)
    require(
        t.dtype == dtype and t.dim() == 1 and (count < 0 or t.shape[0] == count),
        op,
        f"{argument} must be contiguous {name(dtype)} [{size}], got {describe(t)}",
    )
    require_device(op, argument, t, device)
    return t.contiguous()


def checked_scale(op: str, scale: float | None, softcap: float, window: int, depth: int) -> float:
    require(
        0 <= softcap < 1e30 and (softcap == 0 or softcap > 1e-38),
        op,
        f"softcap must be 0 (none) or positive, got {softcap}",
    )
    require(window >= 0, op, f"window must be 0 (none) or positive, got {window}")
    if scale is None:
        return 1 / math.sqrt(depth or 1)
    require(-1e30 < scale < 1e30, op, f"scale must be finite, got {scale}")
    return scale


def require_heads(op: str, argument: str, heads: int, kv_heads: int) -> None:
    require(
        heads % kv_heads == 0 if kv_heads else heads == 0,
        op,
        f"{argument} must have a number of heads that divides that of q, {heads}, got {kv_heads}",
    )


def attention_arguments(
    op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None,
    causal: bool = False, window: int = 0, softcap: float = 0.0, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, sinks: Tensor | None = None,
) -> Attention:  # fmt: skip
    """The arguments of the schema, checked."""
    cu_q, cu_k = cu_seqlens_q, cu_seqlens_k
    packed = cu_q is not None or cu_k is not None
    rank, row, form = (3, 0, "[T, H, D] (with cu_seqlens)") if packed else (4, 2, "[B, H, S, D]")
    for argument, t in (("q", q), ("k", k), ("v", v)):
        require_rank(op, argument, t, rank, form)
        require(
            t.dtype == q.dtype,
            op,
            f"{argument} must have the dtype of q, {name(q.dtype)}, got {name(t.dtype)}",
        )
        require_device(op, argument, t, q.device)
    require(
        k.shape[-1] == q.shape[-1] and (packed or k.shape[0] == q.shape[0]),
        op,
        f"k must have the batch and head size of q, {list(q.shape)}, got {list(k.shape)}",
    )
    require_heads(op, "k", q.shape[1], k.shape[1])
    require(
        v.shape[:-1] == k.shape[:-1],
        op,
        f"v must have the shape of k but for the last size, {list(k.shape)}, got {list(v.shape)}",
    )
    sq, sk = q.shape[row], k.shape[row]
    group = q.shape[1] // max(k.shape[1], 1)
    require(
        sq * group < MOST_KEYS and sk < MOST_KEYS, op, f"q and k must be shorter than 2^30, got {sq} and {sk}"
    )
    for argument, depth in (("q", q.shape[-1]), ("v", v.shape[-1])):
        require(depth <= 256, op, f"{argument} must have a head size of at most 256 on a GPU, got {depth}")
    batch = q.shape[0]
    if packed:
        require(
            cu_q is not None and cu_k is not None,
            op,
            "cu_seqlens_q and cu_seqlens_k must be given together",
        )
        cu_q = require_vector(op, "cu_seqlens_q", cu_q, torch.int32, -1, q.device)
        require(cu_q.shape[0] >= 1, op, "cu_seqlens_q must be [B + 1], got [0]")
        cu_k = require_vector(op, "cu_seqlens_k", cu_k, torch.int32, cu_q.shape[0], q.device)
        batch = cu_q.shape[0] - 1
        require(bias is None, op, f"bias must be absent with cu_seqlens, got {describe(bias)}")
    if bias is not None:
        wanted = [batch, q.shape[1], sq, sk]
        fits = bias.dtype in FLOATING and bias.dim() <= 4
        fits = fits and all(n in (1, w) for n, w in zip(bias.shape[::-1], wanted[::-1], strict=False))
        require(
            fits,
            op,
            f"bias must be float32, float16 or bfloat16 and broadcast to {wanted}, got {describe(bias)}",
        )
        require_device(op, "bias", bias, q.device)
    if sinks is not None:
        sinks = require_vector(op, "sinks", sinks, torch.float32, q.shape[1], q.device)
    return Attention(
        dense_rows(q), dense_rows(k), dense_rows(v), bias, cu_q, cu_k, sinks, batch, q.shape[1],
        k.shape[1], sq, sk, checked_scale(op, scale, softcap, window, q.shape[-1]), softcap,
        min(window, MOST_KEYS), causal,
    )  # fmt: skip
