"""Gated activations, alone or fused with the int8 quantiser.

gate and up: float32, float16 or bfloat16 [..., K], of one dtype and shape; views of a merged gate-up
tensor are read in place. The ``_int8`` forms return what ``quantize_int8`` makes of the float32
result: q int8 [..., K], scale float32 [...], or [..., K / group_size]. Every function raises
RuntimeError naming the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.narrowcast


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up`` (SwiGLU, Shazeer, arXiv 2002.05202)."""
    return _ops.silu_mul(gate, up)


def silu_mul_int8(gate: Tensor, up: Tensor, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """``quantize_int8(silu_mul(gate, up))``: (q, scale)."""
    return _ops.silu_mul_int8(gate, up, group_size)


def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """``gelu(gate) * up`` (GEGLU, same source), gelu by erf, or by tanh with ``approximate="tanh"``."""
    return _ops.gelu_mul(gate, up, approximate)


def gelu_mul_int8(
    gate: Tensor, up: Tensor, approximate: str = "none", group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """``quantize_int8(gelu_mul(gate, up))``: (q, scale)."""
    return _ops.gelu_mul_int8(gate, up, approximate, group_size)
