"""The truth for the gated activations, in float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.double()) * up.double()


def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(gate.double(), approximate=approximate) * up.double()
