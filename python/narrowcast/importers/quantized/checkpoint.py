"""The tensors of a folder of .safetensors files, read lazily; nothing in the files is trusted.

Layout: an 8-byte length, a JSON header (name -> dtype, shape, data_offsets), the tensors.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError

MAX_HEADER = 64 << 20
MAX_RANK, MAX_SIZE = 8, 1 << 40
MAX_JSON = 64 << 20

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


class Checkpoint(Mapping[str, Tensor]):
    """Name -> tensor: a private view of the file, never more memory than the file has bytes.

    ``metadata`` is what the headers say beside the tensors. Raises FormatError for damage.
    """

    def __init__(self, files: list[Path]):
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[Tensor, int, int, torch.dtype, list[int]]] = {}
        for path in files:
            self._open(path)

    @classmethod
    def of_folder(cls, folder: Path) -> Checkpoint:
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
        return cls(files)

    def _open(self, path: Path) -> None:
        name = path.name
        with open(path, "rb") as f:
            end = f.seek(0, 2)
            if end < 8:
                raise FormatError(f"{name} is shorter than a safetensors header")
            # Private pages: torch wants writable memory, the file stays as it is.
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(data[:8], "little")
        if length > min(MAX_HEADER, end - 8):
            raise FormatError(f"{name}: the header has {length} bytes, the file {end}")
        header = parse_json(data[8 : 8 + length], f"the header of {name}")
        if not isinstance(header, dict):
            raise FormatError(f"the header of {name} must be an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise FormatError(f"{name}: the metadata must be texts")
        self.metadata |= metadata
        raw, start, ranges = torch.frombuffer(data, dtype=torch.uint8), 8 + length, []
        for key, entry in header.items():
            if key in self._places:
                raise FormatError(f"{name}: the tensor {key!r} appears twice")
            place = _entry(name, key, entry, end - start)
            ranges.append(place[:2])
            self._places[key] = (raw, start + place[0], start + place[1], *place[2:])
        # Overlapping tensors would let a small file ask for much memory.
        last = 0
        for first, after in sorted(ranges):
            if first < last:
                raise FormatError(f"{name}: tensors overlap at byte {start + first}")
            last = after

    def __getitem__(self, name: str) -> Tensor:
        raw, start, end, dtype, shape = self._places[name]
        data = raw[start:end]
        if start % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def need(self, name: str) -> Tensor:
        """A tensor that the format requires. Raises FormatError when it is missing."""
        if name not in self._places:
            raise FormatError(f"the tensor {name!r} is missing")
        return self[name]


def _entry(name: str, key: str, entry: Any, size: int) -> tuple[int, int, torch.dtype, list[int]]:
    if not isinstance(entry, dict):
        raise FormatError(f"{name}: the entry of {key!r} must be an object")
    kind, shape, offsets = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UnsupportedError(f"{name}: {key!r} has the type {kind!r}, which is not known")
    if not integers(shape, MAX_SIZE) or len(shape) > MAX_RANK:
        raise FormatError(f"{name}: {key!r} has the impossible shape {shape!r}")
    if not integers(offsets, MAX_SIZE) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise FormatError(f"{name}: {key!r} lies outside the file")
    expected = math.prod(shape) * DTYPES[kind].itemsize
    if offsets[1] - offsets[0] != expected:
        raise FormatError(f"{name}: {key!r} has {offsets[1] - offsets[0]} bytes, its shape needs {expected}")
    return offsets[0], offsets[1], DTYPES[kind], shape


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
