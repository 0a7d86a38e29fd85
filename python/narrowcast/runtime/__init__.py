"""Running plans: programs, memory, generation, verification."""

from .executor import Executor

__all__ = ["Executor"]
