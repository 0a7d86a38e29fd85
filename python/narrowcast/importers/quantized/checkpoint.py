"""The tensors of a folder of .safetensors files, read lazily; nothing in the files is trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError

MAX_RANK, MAX_SIZE = 8, 1 << 40
MAX_JSON = 64 << 20


class Checkpoint(Mapping[str, Tensor]):
    """Name -> tensor: a private view of the file, never more memory than the file has bytes.

    ``metadata`` is what the headers say beside the tensors. Raises FormatError for damage.
    """

    def __init__(self, files: list[Path]):
        self.metadata: dict[str, str] = {}
        self._files: dict[str, safetensors.safe_open] = {}
        for path in files:
            self._open(path)

    @classmethod
    def of_folder(cls, folder: Path) -> Checkpoint:
        """The tensors of :func:`weight_files`."""
        return cls(weight_files(folder))

    def _open(self, path: Path) -> None:
        try:
            file = safetensors.safe_open(str(path), framework="pt")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{path.name} is not a whole safetensors file: {error}") from error
        self.metadata |= file.metadata() or {}
        for name in file.keys():  # noqa: SIM118  (no mapping)
            if name in self._files:
                raise FormatError(f"{path.name}: the tensor {name!r} appears twice")
            # Without elements, a shape of any size fits into a file.
            shape = file.get_slice(name).get_shape()
            if len(shape) > MAX_RANK or any(n > MAX_SIZE for n in shape):
                raise FormatError(f"{path.name}: {name!r} has the impossible shape {shape}")
            self._files[name] = file

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            return file.get_tensor(name)
        except (safetensors.SafetensorError, AttributeError, ValueError) as error:
            kind = file.get_slice(name).get_dtype()
            raise UnsupportedError(f"{name!r} has the type {kind}, which cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def need(self, name: str) -> Tensor:
        """A tensor that the format requires. Raises FormatError when it is missing."""
        if name not in self._files:
            raise FormatError(f"the tensor {name!r} is missing")
        return self[name]


def weight_files(folder: Path) -> list[Path]:
    """The files that the index of a folder names; without an index model.safetensors, or all there are."""
    index = read_json(folder / "model.safetensors.index.json")
    if index is not None:
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise FormatError("model.safetensors.index.json has no weight_map of names")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise FormatError(f"model.safetensors.index.json names {file.name!r}, which is not there")
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedError(f"the folder {folder.name!r} has no .safetensors weights")
    return files


def integers(value: Any, limit: int) -> bool:
    """Whether a value is a list of integers from 0 to limit."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= limit for v in value)


def parse_json(raw: bytes, what: str) -> Any:
    """JSON of a file that is not trusted. Raises FormatError."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise FormatError(f"{what} is no JSON") from None


def read_json(path: Path) -> Any:
    """An object or list from a file, or None where there is none. Raises FormatError."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON:
        raise FormatError(f"{path.name} is larger than {MAX_JSON} bytes")
    value = parse_json(path.read_bytes(), path.name)
    if not isinstance(value, dict | list):
        raise FormatError(f"{path.name} must hold an object")
    return value


class Settings:
    """A JSON object whose entries have the types that are asked for."""

    def __init__(self, values: Any, name: str):
        if not isinstance(values, dict):
            raise FormatError(f"{name} must be an object")
        self.values, self.name = values, name

    def integer(self, key: str, default: int | None = None, low: int = 0, high: int = 1 << 31) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise FormatError(f"{self.name}: {key!r} must be an integer from {low} to {high}, got {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise FormatError(f"{self.name}: {key!r} must be true or false, got {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise FormatError(f"{self.name}: {key!r} must be a text, got {value!r}")
        return value

    def inner(self, key: str) -> Settings:
        return Settings(self.values.get(key), f"{self.name}.{key}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None
