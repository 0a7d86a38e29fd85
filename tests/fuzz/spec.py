"""One op under test: how its cases are drawn, which are legal, and what a legal one must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tolerances import BOUND

from .draw import FLOATS, Draw

Arguments = dict[str, Any]


@dataclass
class Expected:
    """A result: exact, or within ``bound`` (that of the dtype when None) of a float64 value.

    magnitude: the size that rounding errors are relative to, where sums cancel; that of the value
        when None. codes: how far integers may be off. check_values=False: only the shape counts.
        kinds=False: NaN and infinity are the same.
    """

    value: Tensor
    dtype: torch.dtype
    exact: bool = True
    magnitude: float = 0.0
    bound: float | None = None
    codes: int = 0
    check_values: bool = True
    kinds: bool = True
    unspecified: Tensor | None = None  # bool, where any value will do


@dataclass
class Op:
    """draw(draw) -> arguments; faults(arguments) -> names that a refusal may give, empty when legal;
    reference(arguments) -> the results, or for in-place ops the tensors written."""

    name: str
    draw: Callable[[Draw], Arguments]
    faults: Callable[[Arguments], set[str]]
    reference: Callable[[Arguments], list[Expected]]
    kernels: str = ""  # name of its kernel list
    overload: str = "default"
    written: tuple[str, ...] = ()  # arguments that hold the results
    elements: Callable[[Arguments], int] = lambda _: 0  # of a result whose size is no input's


def mismatch(got: Tensor, want: Expected) -> str:
    """What is wrong with a result, "" when nothing is."""
    value = want.value
    if got.shape != value.shape or got.dtype != want.dtype:
        return f"got {got.dtype} {list(got.shape)}, expected {want.dtype} {list(value.shape)}"
    if not want.check_values or got.numel() == 0:
        return ""
    if want.exact:
        value = value.to(want.dtype)
        if want.unspecified is not None:
            anywhere = want.unspecified.expand(got.shape)
            got, value = got.masked_fill(anywhere, 0), value.masked_fill(anywhere, 0)
        if want.codes:
            off = int((got.int() - value.int()).abs().max())
            return f"off by {off} codes" if off > want.codes else ""
        same = (got == value) | (got.isnan() & value.isnan()) if got.is_floating_point() else got == value
        return "" if bool(same.all()) else f"{int((~same).sum())} of {same.numel()} elements differ"
    rounded = value.to(want.dtype).double()
    out, value = got.double(), value.double()
    if want.unspecified is not None:
        anywhere = want.unspecified.expand(out.shape)
        out, value, rounded = (t.masked_fill(anywhere, 0.0) for t in (out, value, rounded))
    odd = ~rounded.isfinite()
    if bool((out.isfinite() == odd).any()):
        return f"{int((out.isfinite() == odd).sum())} elements are finite here and not there"
    if want.kinds and bool(odd.any()):
        a, b = out[odd], rounded[odd]
        if not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            return "infinities and NaNs differ"
    out, value = out[~odd], value[~odd]
    if out.numel() == 0:
        return ""
    bound = BOUND[want.dtype] if want.bound is None else want.bound
    spread = torch.finfo(want.dtype)
    floor = 4 * spread.tiny * spread.eps * out.numel() ** 0.5  # steps of subnormal numbers
    size = max(value.norm().item(), want.magnitude * out.numel() ** 0.5)
    # A single number may be off by half a step, which a norm over few elements does not average out.
    allowed = max(bound, spread.eps) * size + floor
    error = (out - value).norm().item()
    return "" if error <= allowed else f"relative error {error / (size or 1):.3g}, allowed {bound:.3g}"


def is_floating(t: Tensor) -> bool:
    return t.dtype in FLOATS


def is_vector(t: Tensor | None, n: int, dtypes=FLOATS) -> bool:
    """Absent, or [n] of one of the dtypes."""
    return t is None or (t.dtype in dtypes and t.shape == (n,))


def overlap(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether the spans of bytes from the first to the last element meet."""
    if a is None or b is None or a.numel() == 0 or b.numel() == 0:
        return False
    spans = []
    for t in (a, b):
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()) if n > 1)
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def bad_out(out: Tensor, sizes, dtypes, *inputs: Tensor | None) -> bool:
    return (
        out.dtype not in dtypes
        or list(out.shape) != list(sizes)
        or not out.is_contiguous()
        or any(overlap(out, t) for t in inputs)
    )
