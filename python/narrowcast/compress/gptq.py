"""Weights of a dense layer rounded so that its outputs change least: GPTQ, then coordinate descent.

With H = E[x x^T] over a layer's inputs, a row of weights that changes by e changes the layer's output by
e H e^T. Rounding goes column by column, the most important first, and hands each column's error on to those
that follow (Frantar et al., "GPTQ", 2022); then codes and scales are improved one at a time, which never makes
the error greater. The loops are C++ (``rounding.h``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from narrowcast import _runtime
from narrowcast.errors import ArgumentError
from narrowcast.formats import GroupedWeight, Int8Weight, pack_int4

#: Added to the diagonal of H, as shares of its mean: the first with which H can be factored is taken.
DAMPING = (0.01, 0.1, 1.0)
#: Passes of coordinate descent after GPTQ; with the 255 codes of int8 it has little left to find.
PASSES, PASSES_INT8 = 4, 1


@dataclass(frozen=True)
class Grid:
    """The codes of a weight: their range, whether a group has an integer zero point, and how scales are kept."""

    low: int
    high: int
    zero_point: bool
    half: bool = True  #: scales are float16


INT4 = Grid(0, 15, True)
INT4_SYMMETRIC = Grid(-8, 7, False)
INT8 = Grid(-127, 127, False)
INT8_ROWS = Grid(-127, 127, False, half=False)  #: with one group per row: the weights of linear_dynamic_int8


@dataclass
class Rounded:
    """A rounded weight [N, K], and what there is to say about how it came about."""

    grid: Grid
    group_size: int
    codes: Tensor  #: int8 [N, K]
    scale: Tensor  #: float32 [N, K / group_size]
    offset: Tensor  #: float32 [N, K / group_size]
    damping: float = 0.0
    dead: int = 0  #: inputs that were zero in all of the calibration data
    error: float = 0.0  #: output energy lost on the calibration data, relative
    notes: list[str] = field(default_factory=list)

    @property
    def sqnr_db(self) -> float | None:
        """Of the layer's output on the calibration data, in decibels; None without such data."""
        return -10 * math.log10(self.error) if self.error > 0 else None

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        groups = self.codes.float().unflatten(1, (-1, self.group_size))
        return (groups * self.scale[..., None] + self.offset[..., None]).flatten(1)

    def rows(self) -> Int8Weight:
        """In the layout of ``linear_dynamic_int8``; for int8 codes in a single group per row."""
        return Int8Weight(self.codes, self.scale[:, 0].contiguous())

    def weight(self) -> GroupedWeight:
        """In the layout of ``linear_grouped``."""
        scale, offset = self.scale.half(), self.offset.half() if self.grid.zero_point else None
        if self.grid.high - self.grid.low > 15:
            return GroupedWeight(8, self.group_size, self.codes.view(torch.uint8), scale, offset)
        codes = self.codes if self.grid.zero_point else self.codes + 8
        return GroupedWeight(4, self.group_size, pack_int4(codes.to(torch.uint8)), scale, offset)


def round_weight(
    weight: Tensor, hessian: Tensor | None, grid: Grid, group_size: int, trust: float = 1.0
) -> Rounded:
    """Rounds a weight [N, K] for inputs with the second moments ``hessian`` [K, K] = E[x x^T].

    trust: what of the moments of two different inputs counts, 0 to 1. Those of a little data hold coincidences that
    other data does not have; with less trust they are exploited less. The error in the result is that of ``hessian``.

    Without a usable hessian (None, or all zero) weights go to the nearest code, and a note says so. Scales are
    searched first, with the diagonal of H as the importance of a column. When H cannot be factored, more is
    added to its diagonal (DAMPING); the amount and every retry are in the result.

    Raises ArgumentError when group_size does not divide K or a number is not finite.
    """
    weight = weight.detach().float().contiguous()
    n, k = weight.shape
    if group_size < 1 or k % group_size:
        raise ArgumentError(f"group_size must divide K = {k}, got {group_size}")
    if not weight.isfinite().all():
        raise ArgumentError("weight must be finite")
    groups = k // group_size
    result = Rounded(
        grid, group_size, torch.zeros(n, k, dtype=torch.int8), torch.ones(n, groups), torch.zeros(n, groups)
    )
    layer = _runtime.RoundedLayer(
        n, k, group_size, grid.low, grid.high, grid.zero_point, grid.half, weight.data_ptr(),
        result.scale.data_ptr(), result.offset.data_ptr(), result.codes.data_ptr(),
    )  # fmt: skip
    if hessian is None or not hessian.diagonal().any():
        result.notes.append("no calibration data reached it: rounded to nearest")
        result.dead = k
        alike = torch.ones(k)
        _runtime.search_scales(layer, alike.data_ptr())
        return result
    if hessian.shape != (k, k) or not hessian.isfinite().all():
        raise ArgumentError(f"hessian must be finite [{k}, {k}], got {list(hessian.shape)}")
    hessian = hessian.float().contiguous()
    importance = hessian.diagonal().contiguous()
    result.dead = int((importance == 0).sum())
    _runtime.search_scales(layer, importance.data_ptr())
    order = importance.argsort(descending=True, stable=True)
    believed = hessian
    if trust < 1:
        believed = hessian * trust
        believed.diagonal().copy_(importance)
    feed, result.damping = _factor(believed, order, result)
    order = order.to(torch.int32)
    if feed is not None:
        _runtime.round_in_order(layer, order.data_ptr(), feed.data_ptr())
    passes = PASSES if grid.high - grid.low < 32 else PASSES_INT8
    _runtime.refine(layer, order.data_ptr(), believed.data_ptr(), passes)
    change = weight - result.dequantize()
    signal = ((weight @ hessian) * weight).sum().item()
    result.error = ((change @ hessian) * change).sum().item() / max(signal, 1e-30)
    return result


def _factor(hessian: Tensor, order: Tensor, result: Rounded) -> tuple[Tensor | None, float]:
    """(U^T, damping) with H + damping * mean = U D U^T in the given order, U unit upper triangular."""
    ordered = hessian[order][:, order].double()
    mean = ordered.diagonal().mean()
    for damping in DAMPING:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        # The Cholesky factor of the matrix read backwards is U read backwards.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and lower.isfinite().all():
            upper = lower.flip(0, 1)
            return (upper / upper.diagonal()).t().float().contiguous(), damping
        result.notes.append(f"its Hessian could not be factored with damping {damping:g}")
    result.notes.append("GPTQ was left out: rounded to nearest, then improved by coordinate descent")
    return None, DAMPING[-1]
