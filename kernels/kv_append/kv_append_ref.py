"""The truth for kv_append: one token and head at a time; and what a cache of 4-bit codes means."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.kernels.quantize.quantize_ref import quantize_int8
from narrowcast.kernels.rope.rope_ref import rope


def kv_append(
    k_cache, v_cache, k, v, start, k_scale=None, v_scale=None, cos=None, sin=None, interleaved=False,
    block_table=None, k_shift=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """New caches (and scales), the arguments untouched."""
    turned = k if cos is None else rope(k, cos, sin, start, interleaved)
    turned = turned if k_shift is None else turned.double() - k_shift.double()[:, None]
    results = []
    for cache, scale, x in ((k_cache, k_scale, turned), (v_cache, v_scale, v)):
        cache, scale = cache.clone(), None if scale is None else scale.clone()
        for b in range(k.shape[0]):
            for s in range(k.shape[2]):
                at = (b, slice(None), int(start[b]) + s)
                if block_table is not None:
                    page = cache.shape[2]
                    at = (int(block_table[b, at[2] // page]), slice(None), at[2] % page)
                if cache.dtype == torch.uint8:
                    cache[at], scale[at] = to_nibbles(x[b, :, s])
                elif scale is None:
                    cache[at] = x[b, :, s].to(cache.dtype)
                else:
                    cache[at], scale[at] = quantize_int8(x[b, :, s].float())
        results += [cache] if scale is None else [cache, scale]
    return tuple(results)


def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's matrix over sqrt(size), float64: its own inverse."""
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device)
    result = torch.ones(1, 1, dtype=torch.float64, device=device)
    while result.shape[0] < size:
        result = torch.kron(result, one)
    return result / size**0.5


def to_nibbles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [.., D] as codes uint8 [.., D / 2] and grids bfloat16 [.., D / 16]: hadamard.h."""
    x = x.double().nan_to_num(0.0, 1e30, -1e30).clamp(-1e30, 1e30)
    y = (x @ hadamard(x.shape[-1], x.device)).unflatten(-1, (-1, 32))
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    best, codes, grid = None, None, None
    for shrink in (0.0, 0.03, 0.06, 0.09, 0.12):
        minimum = (low + (high - low) * shrink / 2).bfloat16().double()
        step = ((high - low) * (1 - shrink) / 15).bfloat16().double()
        step = torch.where(step < 1e-30, 1.0, step)
        new = ((y - minimum) / step).round().clamp(0, 15)
        error = ((new * step + minimum - y) ** 2).sum(-1, keepdim=True)
        pair = torch.cat((step, minimum), -1)
        if best is None:
            best, codes, grid = error, new, pair
        codes, grid = torch.where(error < best, new, codes), torch.where(error < best, pair, grid)
        best = torch.minimum(error, best)
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return (low | high << 4).flatten(-2), grid.flatten(-2).bfloat16()


def from_nibbles(codes: Tensor, grid: Tensor) -> Tensor:
    """The rows [.., D] in float64 that codes and grids stand for."""
    codes, grid = codes.unflatten(-1, (-1, 16)), grid.double().unflatten(-1, (-1, 2))
    y = torch.cat((codes & 15, codes >> 4), -1) * grid[..., :1] + grid[..., 1:]
    y = y.flatten(-2)
    return y @ hadamard(y.shape[-1], y.device)
