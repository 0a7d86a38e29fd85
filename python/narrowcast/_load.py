"""Loads the compiled libraries and remembers what was skipped and why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ._version import __version__

_notes: list[str] = []


def library_path(name: str, folders: Iterable[str]) -> Path:
    """Path of a shared library that the build put into this package.

    Takes the package's ``__path__``: in an editable install, sources and built libraries lie in two
    folders, and only ``__path__`` names both.
    """
    for folder in map(Path, folders):
        if (folder / name).is_file():
            return folder / name
    raise ImportError(f"{name} is not in {list(folders)}; build it with: pip install --no-build-isolation .")


def load_libraries(folders: Iterable[str]) -> None:
    torch.ops.load_library(library_path("libnarrowcast_cpu.so", folders))
    if torch.version.cuda is None:
        _notes.append("CUDA library: not loaded, this torch has no CUDA")
        return
    try:
        torch.ops.load_library(library_path("libnarrowcast_cuda.so", folders))
    except (ImportError, OSError) as error:
        _notes.append(f"CUDA library: not loaded ({error})")


def show_config() -> str:
    """What was built, what was loaded, and what this machine offers, as text."""
    lines = [
        f"narrowcast {__version__}, torch {torch.__version__}",
        f"CPU kernels: {torch.ops.narrowcast._isa()}, {torch.get_num_threads()} threads",
        *_notes,
    ]
    return "\n".join(lines)
