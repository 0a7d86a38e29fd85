"""What this machine's GPUs were measured to do best, kept on disk: one small JSON file per GPU model.

A result can always be had without it: the first candidate of a list is the one that a person chose.
The file is a cache. It may be deleted, it may be unreadable, two processes may write it: the last wins.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

Candidate = TypeVar("Candidate")


def folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "narrowcast" / "tuning"


class Table:
    """Key -> the name of the best candidate, for one GPU model."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, str] = self._read()

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}

    def get(self, key: str) -> str | None:
        return self.entries.get(key)

    def put(self, key: str, value: str) -> None:
        self.entries = {**self._read(), **self.entries, key: value}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent)
            with os.fdopen(handle, "w") as file:
                json.dump(self.entries, file, indent=0, sort_keys=True)
            os.replace(temporary, self.path)
        except OSError:
            pass  # a read-only home: measured again by the next process


@functools.cache
def table(device_index: int) -> Table:
    gpu = torch.cuda.get_device_properties(device_index)
    label = re.sub(r"\W+", "-", f"{gpu.name} sm_{gpu.major}{gpu.minor}").strip("-")
    return Table(folder() / f"{label}.json")


def milliseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of one call on the current device, after two that warm up."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def choose(
    key: str, candidates: Sequence[Candidate], run: Callable[[Candidate], Any], device: torch.device
) -> Candidate:
    """The fastest of a few candidates, measured once per GPU model and key, and remembered.

    ``run`` must give the same result however often it runs. Nothing is measured on a CPU, nor while a
    CUDA graph is being captured; the first candidate is taken then.
    """
    if len(candidates) == 1 or device.type != "cuda":
        return candidates[0]
    names = [str(c) for c in candidates]
    known = table(_index(device))
    if (best := known.get(key)) in names:
        return candidates[names.index(best)]
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = {}
    for name, candidate in zip(names, candidates):
        try:
            times[name] = milliseconds(lambda c=candidate: run(c))
        except Exception:  # too much shared memory for this GPU, say: not a candidate here
            continue
    if not times:
        return candidates[0]
    best = min(times, key=times.__getitem__)
    known.put(key, best)
    return candidates[names.index(best)]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
