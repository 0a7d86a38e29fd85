"""Scales of quantised weights, searched by the error they make on the inputs that a layer really sees."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.formats import GroupedWeight, Int8Weight, pack_int4

#: How far below the largest value a scale may clip.
_SHRINK = torch.linspace(1.0, 0.8, 6).tolist()
_SHRINK_INT4 = torch.linspace(1.0, 0.65, 8).tolist()


def int8_rows(weight: Tensor, importance: Tensor | None = None) -> Int8Weight:
    """[N, ...] -> int8, one scale per row, that with the least error sum importance * (w_hat - w)^2.

    importance: E[x^2] per input of the row, broadcastable to ``weight[0]``; None: all alike.
    """
    rows = weight.detach().float().flatten(1)
    weights = (
        torch.ones(rows.shape[1]) if importance is None else importance.expand(weight.shape[1:]).flatten()
    )
    amax = rows.abs().amax(1).clamp(min=1e-30)
    best_error = torch.full_like(amax, float("inf"))
    best = amax / 127
    for shrink in _SHRINK:
        scale = amax * shrink / 127
        q = (rows / scale[:, None]).round_().clamp_(-127, 127)
        error = q.mul_(scale[:, None]).sub_(rows).square_() @ weights
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    best = torch.where(rows.abs().amax(1) > 0, best, 1.0)
    q = (rows / best[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Int8Weight(q.reshape(weight.shape) if weight.dim() == 2 else q, best)


def nearest_rows(weight: Tensor, bits: int) -> Tensor:
    """The weight [O, ...] with every value at the nearest of 2^bits codes of its row's whole range, in float32."""
    rows, most = weight.detach().float().flatten(1), 2 ** (bits - 1) - 1
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / most
    return ((rows / scale).round() * scale).reshape(weight.shape)


def grouped(
    weight: Tensor, bits: int, group_size: int, importance: Tensor | None = None, symmetric: bool = False
) -> GroupedWeight:
    """[N, K] -> int4 or int8 in groups along K, scales float16, searched as in :func:`int8_rows`.

    Asymmetric int4 has an integer zero point 0..15 per group (stored as offset = -zero * scale); symmetric
    int4 uses the full range -8..7 with a scale of either sign. int8 is symmetric.
    """
    n, k = weight.shape
    groups = weight.detach().float().reshape(n, k // group_size, group_size)
    weights = (torch.ones(k) if importance is None else importance.float()).reshape(1, -1, group_size)
    if bits == 8:
        return _symmetric(groups, weights, 8)
    return _symmetric(groups, weights, 4) if symmetric else _asymmetric_int4(groups, weights)


def _half(scale: Tensor) -> Tensor:
    """Rounded as it will be stored; a group of zeros gets 1."""
    scale = scale.half().float()
    return torch.where(scale == 0, 1.0, scale)


def _symmetric(groups: Tensor, weights: Tensor, bits: int) -> GroupedWeight:
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    top = largest / low if bits == 4 else largest.abs() / high
    best_error = torch.full_like(top, float("inf"))
    best = _half(top)
    for shrink in _SHRINK_INT4 if bits == 4 else _SHRINK[:5]:
        for sign in (1.0, -1.0) if bits == 4 else (1.0,):
            scale = _half(top * shrink * sign)
            q = (groups / scale[..., None]).round_().clamp_(low, high)
            error = (q.mul_(scale[..., None]).sub_(groups).square_() * weights).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, scale, best)
    q = (groups / best[..., None]).round().clamp(low, high).to(torch.int8).flatten(1)
    if bits == 8:
        return GroupedWeight(8, groups.shape[-1], q.view(torch.uint8), best.half(), None)
    return GroupedWeight(4, groups.shape[-1], pack_int4((q + 8).to(torch.uint8)), best.half(), None)


def _asymmetric_int4(groups: Tensor, weights: Tensor) -> GroupedWeight:
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    best_error = torch.full_like(low, float("inf"))
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in _SHRINK_INT4:
        scale = _half((high - low) * shrink / 15)
        for nudge in (0.0, 0.5, -0.5):
            zero = (-low * shrink / scale + nudge).round().clamp(0, 15)
            offset = (-zero * scale).half().float()
            q = ((groups - offset[..., None]) / scale[..., None]).round_().clamp_(0, 15)
            error = (q.mul_(scale[..., None]).add_(offset[..., None]).sub_(groups).square_() * weights).sum(
                -1
            )
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    offset = (-best_zero * best_scale).half()
    q = ((groups - offset.float()[..., None]) / best_scale[..., None]).round().clamp(0, 15)
    packed = pack_int4(q.to(torch.uint8).flatten(1))
    return GroupedWeight(4, groups.shape[-1], packed, best_scale.half(), offset)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10 of signal power over error power; 200 when equal."""
    noise = (approximation - reference).double().square().sum().item()
    signal = reference.double().square().sum().item()
    if noise == 0:
        return 200.0
    return 10 * torch.log10(torch.tensor(max(signal, 1e-300) / noise)).item()
