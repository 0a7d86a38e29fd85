"""Other engines, one file each, at the same job on the same data and threads.

Each file has some of ``encoder(task)``, ``image(task)`` and ``decoder(task)``, which return the engine's variants
or raise ImportError where its package is absent: then it is named as absent and the others go on. The files
``compress_*`` have ``recipes(kind, task)``: what the engine offers to compress the model with, made one at a time.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

NAMES = ("torch", "openvino", "onnxruntime", "llama_cpp")
COMPRESSORS = ("openvino", "onnxruntime", "torch", "torchao", "llama_cpp")


@dataclass(frozen=True)
class Task:
    """What every engine is given: the original model, what it may calibrate on, and the threads."""

    module: nn.Module | None
    path: Path
    calibration: list[tuple[Tensor, ...]]
    threads: int


@dataclass
class Engine:
    """One variant of an engine. ``prepare(inputs)`` returns the call for inputs of these shapes.

    seconds: what compressing took. cpu_seconds: of processors, which other load does not change much. bytes: of the
    weights as that engine keeps them on disk, 0 if unknown. timed: ``prepare`` for timings, where that is another.
    """

    name: str
    prepare: Callable[..., Callable[[], Any]]
    seconds: float = 0.0
    bytes: int = 0
    cpu_seconds: float = 0.0
    timed: Callable[..., Callable[[], Any]] | None = None
    note: str = ""


def engines(kind: str, task: Task, report: Callable[[str], None] = print) -> list[Engine]:
    """All variants of all engines that are here; absent and failing ones are named."""
    found: list[Engine] = []
    for name in NAMES:
        module = importlib.import_module(f"peers.{name}_peer")
        make = getattr(module, kind, None)
        if make is None:
            continue
        try:
            found += make(task)
        except ImportError as error:
            report(f"absent: {name} ({error})")
        except Exception as error:
            report(f"failed: {name} ({type(error).__name__}: {str(error).splitlines()[0][:150]})")
    return found


class Unsupported(Exception):
    """Why a recipe cannot be had."""


@dataclass(frozen=True)
class Recipe:
    """A way to compress: ``make`` does it, and may raise."""

    tool: str
    name: str
    make: Callable[[], Engine]


def compressors(kind: str, task: Task) -> list[Recipe]:
    """What every tool offers for this kind of model. A tool that is absent has one recipe, which says so."""
    found: list[Recipe] = []
    for name in COMPRESSORS:
        try:
            offered = importlib.import_module(f"peers.compress_{name}").recipes(kind, task)
        except (ImportError, Unsupported) as error:
            offered = {"all": partial(_raise, error)}
        found += [Recipe(name, recipe, make) for recipe, make in offered.items()]
    return found


def _raise(error: Exception) -> Engine:
    raise error


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start, self.cpu_start = time.monotonic(), time.process_time()

    def __float__(self) -> float:
        return time.monotonic() - self.start

    def read(self) -> dict[str, float]:
        """``seconds`` and ``cpu_seconds`` of an Engine."""
        return {"seconds": float(self), "cpu_seconds": time.process_time() - self.cpu_start}
