"""Fused INT8 / INT4 / FP16 kernels for PyTorch, and a graph executor that compresses and runs real models.

Ops are ``torch.ops.narrowcast.*``; models go through :func:`compress` and :func:`load`.
"""

from ._load import load_libraries, show_config
from ._version import __version__
from .errors import ArgumentError, Error, FormatError, UnsupportedError, VerificationError

load_libraries(__path__)

from . import _register  # noqa: E402, F401  (fakes can only be registered once the ops exist)

__all__ = [
    "ArgumentError",
    "Error",
    "FormatError",
    "UnsupportedError",
    "VerificationError",
    "__version__",
    "show_config",
]
