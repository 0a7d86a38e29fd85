"""What a backend takes less of than its op's contract allows: ``LIMITS`` of a room, beside the kernels that set it.

    LIMITS = {"cuda": (dtypes("q", torch.float16, torch.bfloat16), last_size("q", 256))}

Limits hold for every op of the room that has the argument. The dispatcher reads them before it chooses, so that a call
goes to a backend that takes it; the kernels' own checks stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .checks import name

#: The arguments of a call by name: tensors, or anything with their ``shape`` and ``dtype``; a dtype of None is unknown.
Given = Mapping[str, Any]


@dataclass(frozen=True)
class Limit:
    """``argument`` must be ``expected``; fits(value, given), and what to show of a value that does not."""

    argument: str
    expected: str
    fits: Callable[[Any, Given], bool]
    shown: Callable[[Any], str] = str

    def refusal(self, given: Given) -> str:
        """ "q must be float16 or bfloat16, got float32", or "" where the call fits. What is not given fits."""
        value = given.get(self.argument)
        return "" if value is None or self.fits(value, given) else f"{self}, got {self.shown(value)}"

    def __str__(self) -> str:
        return f"{self.argument} must be {self.expected}"


def _dtype(value: Any) -> str:
    return name(value.dtype)


def dtypes(argument: str, *allowed: torch.dtype) -> Limit:
    expected = " or ".join(map(name, allowed))
    return Limit(argument, expected, lambda value, _: value.dtype in (None, *allowed), _dtype)


def dtype_like(argument: str, other: str, *allowed: torch.dtype) -> Limit:
    """The dtype of another argument, or one of these."""

    def fits(value: Any, given: Given) -> bool:
        known = given[other].dtype
        return known is None or value.dtype in (None, known, *allowed)

    return Limit(argument, f"{' or '.join(map(name, allowed))} or of the dtype of {other}", fits, _dtype)


def last_size(argument: str, most: int) -> Limit:
    """A last dimension (the size of a head) of at most so many elements."""

    def fits(value: Any, _: Given) -> bool:
        return not len(value.shape) or value.shape[-1] <= most

    return Limit(argument, f"at most {most} in its last size", fits, lambda value: str(value.shape[-1]))


def one_of(argument: str, *values: Any) -> Limit:
    return Limit(argument, " or ".join(map(str, values)), lambda value, _: value in values)
