"""What a search works on, and what it keeps on disk, so that a run that was cut short goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from narrowcast._version import __version__
from narrowcast.errors import ArgumentError
from narrowcast.files import atomic_path
from narrowcast.graph import Graph

from .items import Form
from .work_folder import WorkFolder, fingerprint


class Parts(Protocol):
    """The data of a search: batches in the form that the graph takes."""

    calibration: list[tuple[Tensor, ...]]
    synthetic: list[tuple[Tensor, ...]]  #: rounded for as well
    selection: list[tuple[Tensor, ...]]
    held_out: list[tuple[Tensor, ...]]
    seed: int
    hash: str | None

    def valid(self, inputs: tuple[Tensor, ...]) -> Tensor | None: ...


class Memory:
    """What a search has measured, on disk. Plain JSON beside the work folders of GPTQ."""

    def __init__(
        self, work: str | Path | None, graph: Graph, data: Parts, forms: Sequence[Form], keep_float: set[str]
    ):
        self.folder = None if work is None else Path(work)
        self._rounds: list[WorkFolder] = []
        if self.folder is None:
            return
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cannot make the work folder {self.folder}: {error}") from error
        about = {
            "version": __version__, "weights": fingerprint(graph.weights), "data": data.hash, "seed": data.seed,
            "batches": [len(data.calibration), len(data.selection), len(data.held_out)],
            "forms": [form.name for form in forms], "keep_float": sorted(keep_float),
        }  # fmt: skip
        self.about = about
        self.path = self.folder / "search.json"
        self.found: dict[str, Any] = {}
        try:
            found = json.loads(self.path.read_text())
            if found.pop("about") == about:
                self.found = found
        except (OSError, ValueError, KeyError, AttributeError):
            pass  # nothing there, or not ours: measured again

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time; the objective is no part of what is known."""
        if self.folder is None:
            return make()
        if key not in self.found:
            self.found[key] = make()
            with atomic_path(self.path) as path:
                path.write_text(json.dumps({"about": self.about, **self.found}))
        return self.found[key]

    def rounds(self, graph: Graph, data: Parts, layers: list[str]) -> WorkFolder | None:
        """The folder of one run of GPTQ over these layers."""
        if self.folder is None:
            return None
        about = self.about | {"layers": layers}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        self._rounds.append(WorkFolder(self.folder / f"rounds-{name}", about))
        return self._rounds[-1]

    def remove(self) -> None:
        if self.folder is None:
            return
        for folder in self._rounds:
            folder.remove()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody put a file there
            self.folder.rmdir()
