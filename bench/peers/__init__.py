"""Other engines, one file each, at the same job on the same data and threads.

Each file has some of ``encoder(task)``, ``image(task)`` and ``decoder(task)``, which return the engine's variants
or raise ImportError where its package is absent: then it is named as absent and the others go on.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

NAMES = ("torch", "openvino", "onnxruntime", "llama_cpp")


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

    seconds: what compressing took. bytes: of the weights as that engine keeps them on disk, 0 if unknown.
    """

    name: str
    prepare: Callable[..., Callable[[], Any]]
    seconds: float = 0.0
    bytes: int = 0


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


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __float__(self) -> float:
        return time.monotonic() - self.start
