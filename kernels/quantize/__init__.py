"""Float to INT8: per token, per group of a token, or by a given scale.

Rounding is half to even, the result saturates. Infinities become the largest code of their sign, NaN
the zero point, and NaNs are counted (:func:`nan_count`); ``strict=True`` raises for both. Every
function raises RuntimeError naming the argument. All backends agree bit for bit (``quantize.h``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ops = torch.ops.narrowcast


def quantize_int8(x: Tensor, group_size: int = 0, strict: bool = False) -> tuple[Tensor, Tensor]:
    """``scale = max |x| / 127``, ``q = round(x * (1 / scale))`` in -127 .. 127: (q, scale).

    x: float32, float16 or bfloat16 [..., K]. The range is taken over finite values; a row of zeros has
    scale 1.
    q: int8 [..., K]. scale: float32 [...], or [..., K / group_size] when ``group_size`` > 0.
    """
    return _ops.quantize_int8(x, group_size, strict)


def quantize_int8_asymmetric(x: Tensor, strict: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``scale = (high - low) / 255``, ``q = round(x * (1 / scale)) + zero_point`` in -128 .. 127.

    x: as for :func:`quantize_int8`; low and high are the range of a row, 0 included.
    Returns q int8 [..., K], scale float32 [...], zero_point int32 [...].
    """
    return _ops.quantize_int8_asymmetric(x, strict)


def quantize_int8_static(
    x: Tensor,
    scale: float,
    zero_point: int = 0,
    dtype: torch.dtype = torch.int8,
    strict: bool = False,
) -> Tensor:
    """``q = round(x * (1 / scale)) + zero_point`` in -127 .. 127 (int8) or 0 .. 255 (uint8).

    x: float32, float16 or bfloat16 of any shape; q has its shape and its order in memory.
    """
    return _ops.quantize_int8_static(x, scale, zero_point, dtype, strict)


def nan_count(reset: bool = False) -> int:
    """NaNs that the quantisers of this process have met since the last reset, on every device.

    Waits for the GPUs whose quantisers ran.
    """
    count = _ops.nan_count(reset)
    for findings in _findings.values():
        count += int(findings[0])
        if reset:
            findings.zero_()
    return count


#: Device -> int64 [2] there: NaNs, values that are not finite. Kernels add to it, so that no op waits for a GPU.
_findings: dict[torch.device, Tensor] = {}


@contextmanager
def findings_of(op: str, device: torch.device, strict: bool = False) -> Iterator[Tensor]:
    """What a kernel of ``op`` adds its findings to. When strict: waits for it, raises if x was not finite."""
    if device not in _findings:
        _findings[device] = torch.zeros(2, dtype=torch.int64, device=device)
    total = _findings[device]
    if not strict:
        yield total
        return
    found = torch.zeros_like(total)
    yield found
    total += found
    if found[1]:
        raise RuntimeError(f"{op}: x must be finite (strict), got NaN or infinity")
