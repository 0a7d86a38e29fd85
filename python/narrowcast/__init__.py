"""Fused INT8 / INT4 / FP16 kernels for PyTorch, and a graph executor that compresses and runs real models.

Ops are ``torch.ops.narrowcast.*``; models go through :func:`compress` and :func:`load`.
"""

import importlib

from ._load import load_libraries, show_config
from ._version import __version__
from .errors import ArgumentError, Error, FormatError, UnsupportedError, VerificationError

load_libraries(__path__)

from . import (  # noqa: E402  (can only be registered once the ops exist)
    _register,  # noqa: F401
    _register_cuda,  # noqa: F401
)
from .dispatch import backend, explain  # noqa: E402

#: Loaded when first used: importing narrowcast should cost little more than importing torch.
_LAZY = {
    "Evaluation": ".compress",
    "Executor": ".runtime",
    "Plan": ".graph",
    "evaluate": ".compress",
    "load": ".runtime",
    "predict": ".compress",
    "verify": ".runtime",
}


def __getattr__(name: str):
    if name in ("nn", "functional", "compress"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "nn", "functional", "compress"})


__all__ = [
    "ArgumentError",
    "Error",
    "Evaluation",
    "Executor",
    "FormatError",
    "Plan",
    "UnsupportedError",
    "VerificationError",
    "__version__",
    "backend",
    "compress",
    "evaluate",
    "explain",
    "load",
    "predict",
    "show_config",
    "verify",
]
