"""Running plans: programs, memory, generation, verification."""

from __future__ import annotations

import os

from ..graph.plan import Plan
from .executor import Executor
from .verify import Report, certify, verify

__all__ = ["Executor", "Report", "certify", "load", "verify"]


def load(path: str | os.PathLike, device: str = "auto", **options) -> Executor:
    """The executor of a plan file; its weights stay in the file's memory map until they are packed.

    device and options: see :class:`Executor`. Raises what ``Plan.load`` raises: ArgumentError for a missing
    file, FormatError for one that is truncated or altered, UnsupportedError for a newer format.
    """
    return Executor(Plan.load(path), device=device, **options)
