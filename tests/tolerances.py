"""Error bounds of floating-point results, in one place.

The measure is ||out - reference|| / ||reference|| against the float64 reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Bound for one op whose accumulation is float32, by the dtype of its output.
BOUND = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||, in float64; 0 when both are zero."""
    out, reference = out.double(), reference.double()
    norm = reference.norm().item()
    error = (out - reference).norm().item()
    return error / norm if norm else error


def assert_close(out: Tensor, reference: Tensor, bound: float | None = None, message: str = ""):
    assert out.shape == reference.shape, f"{message} shape {out.shape} != {reference.shape}"
    bound = BOUND[out.dtype] if bound is None else bound
    error = relative_error(out, reference)
    assert error <= bound, f"{message} relative error {error:.3g} > {bound:.3g}"


#: Bound for the outputs of a whole plan on one device against another, by recipe. Float: rounding of many ops in other
#: orders. Quantised: codes that fall to the other side of a tie and what follows from them; the CPU's own kernel
#: sets differ by up to 0.016 on MiniLM and EfficientNet-Lite0.
PLAN_BOUND = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.04, "int4": 0.05}
