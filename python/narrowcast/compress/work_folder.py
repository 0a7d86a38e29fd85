"""Layers that are finished, on disk: a compression that was cut short goes on from there, bit for bit.

One safetensors file per layer, written whole or not at all, and one file that says what the run was about.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch

from narrowcast.errors import ArgumentError
from narrowcast.files import atomic_path

from .gptq import Grid, Rounded

if TYPE_CHECKING:
    from .sequential import Target

_RUN = "run.json"
_KEY = "narrowcast"


class WorkFolder:
    """``folder`` is made when it is missing. ``run``: plain JSON that names the model, the data and the options.

    Layers of another run are deleted, files of any other name are left alone.

    Raises ArgumentError when the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike, run: dict):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cannot make the work folder {self.folder}: {error}") from error
        text = json.dumps(run, sort_keys=True)
        known = self.folder / _RUN
        if not known.is_file() or known.read_text() != text:
            self._delete_layers()
            with atomic_path(known) as path:
                path.write_text(text)

    def load(self, index: int, target: Target) -> Rounded | None:
        """A finished layer, or None when it is not there or the file is damaged."""
        path = self._path(index)
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                about = json.loads(file.metadata()[_KEY])
                tensors = {name: file.get_tensor(name) for name in ("codes", "scale", "offset")}
        except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError):
            return None
        if about.pop("name") != target.name:
            return None
        return Rounded(Grid(**about.pop("grid")), **tensors, **about)

    def save(self, index: int, target: Target, layer: Rounded) -> None:
        about = {
            "name": target.name,
            "grid": vars(layer.grid),
            "group_size": layer.group_size,
            "damping": layer.damping,
            "dead": layer.dead,
            "error": layer.error,
            "notes": layer.notes,
        }
        tensors = {"codes": layer.codes, "scale": layer.scale, "offset": layer.offset}
        with atomic_path(self._path(index)) as path:
            safetensors.torch.save_file(tensors, str(path), metadata={_KEY: json.dumps(about)})

    def remove(self) -> None:
        """Deletes the layers, and the folder when nothing else is in it."""
        self._delete_layers()
        (self.folder / _RUN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody put a file there
            self.folder.rmdir()

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def _delete_layers(self) -> None:
        for path in self.folder.glob("layer-*.safetensors"):
            path.unlink()


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and values of weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
