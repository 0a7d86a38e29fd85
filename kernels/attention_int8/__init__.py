"""Softmax attention whose scores are int8 products of smoothed keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import LIMITS  # noqa: F401  (the loop of attention)

_ops = torch.ops.narrowcast


def attention_int8(
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
) -> Tensor:
    """``attention`` with ``q k^T`` from int8: k less its mean over the sequence, one scale per row.

    ``s[i, j] = qs[i] * ks[j] * (q8[i] . k8[j])`` with ``q8 = round(scale * q / qs)``,
    ``k8 = round((k - mean) / ks)``, ``qs`` and ``ks`` the largest magnitude of a row over 127.
    Softmax does not see the mean; where a softcap or sinks do, it is added back. Softmax and the
    sums over v are those of ``attention``.

    Arguments, shapes, masks and result are those of ``attention``; D is at most 65536. A row of q
    or k that holds NaN or infinity turns NaN what sees it, and nothing else.

    A score is off by at most ``qs/2 |k - mean|_1 + ks/2 |scale q|_1 + D qs ks / 4``; for rows of
    standard normal values ``||out - exact|| <= 0.02 ||exact||``.

    Triton has a second form that keeps to integers: weights of 8 bits times v in 8 bits with a scale per key,
    summed in int32 (attention_int8_values_triton.py has formula and bound; for standard normal values it, too,
    stays within 0.02). It rounds more than this op says, so it is asked for by name:
    ``attention_int8_triton.attention_all_int8(q, k, v, ...)``.

    Raises RuntimeError naming the argument. Smoothing of keys: Zhang et al. 2024,
    arXiv 2410.02367.
    """
    return _ops.attention_int8(
        q, k, v, bias, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k, sinks
    )
