"""A reader of GGUF files (versions 2 and 3, little-endian) that trusts nothing in them.

Every count, length, size and offset is compared with the bytes that are really there before anything is
allocated for it, so a file can cost no more memory than its own size.

Layout: the GGUF specification in the ggml repository (docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import ArgumentError, FormatError, UnsupportedError
from narrowcast.formats import GGUF_BLOCKS, GGUF_GROUPED, GroupedWeight, from_gguf

MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_NAME = 1 << 16
MAX_STRING = 1 << 20
MAX_ARRAY = 1 << 24
MAX_DIMS = 4
MAX_DIM = (1 << 31) - 1
MAX_ALIGNMENT = 1 << 20

#: Number of a tensor type -> its name, for the types that can be read.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 30: "BF16",
}  # fmt: skip

#: Types that exist in GGUF files and cannot be read here; anything else is damage.
_OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

#: Number of a metadata type -> its struct letter. 8 is a string, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the directory: the shape is row-major (the file's order reversed)."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    """Reads forward and never past the end."""

    def __init__(self, data: mmap.mmap, name: str):
        self.data, self.at, self.end, self.name = data, 0, len(data), name

    def fail(self, text: str) -> FormatError:
        return FormatError(f"{self.name}: {text} (at byte {self.at})")

    def take(self, n: int, what: str) -> bytes:
        if n > self.end - self.at:
            raise self.fail(f"{what} needs {n} bytes, {self.end - self.at} are left")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        n = self.number("Q", what)
        if n > limit:
            raise self.fail(f"{what} has {n} bytes, at most {limit} are accepted")
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _NUMBERS:
            raise self.fail(f"{what} has the unknown type {kind}")
        value = self.number(_NUMBERS[kind], what)
        return bool(value) if kind == _BOOL else value

    def array(self, what: str) -> list:
        kind, n = self.number("I", what), self.number("Q", what)
        if kind != _STRING and kind not in _NUMBERS:
            raise self.fail(f"{what} is an array of the type {kind}, numbers or strings are accepted")
        width = 8 if kind == _STRING else struct.calcsize(_NUMBERS[kind])
        if n > MAX_ARRAY or n * width > self.end - self.at:
            raise self.fail(f"{what} has {n} elements, which the file cannot hold")
        if kind == _STRING:
            return [self.string(what) for _ in range(n)]
        values = struct.unpack(f"<{n}{_NUMBERS[kind]}", self.take(n * width, what))
        return [bool(v) for v in values] if kind == _BOOL else list(values)


class GGUFFile:
    """An opened file: ``metadata``, and ``tensors`` by name; the data stays on disk until asked for.

    Raises FormatError when the file is damaged, UnsupportedError for versions, tensor types and split files
    that cannot be read here.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        name = self.path.name
        with open(self.path, "rb") as f:
            if f.seek(0, 2) < 24:
                raise FormatError(f"{name} is shorter than a GGUF header")
            # Private pages: torch wants writable memory, the file stays as it is.
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        cursor = _Cursor(self._map, name)
        if cursor.take(4, "the magic") != b"GGUF":
            raise FormatError(f"{name} does not begin with GGUF")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            raise UnsupportedError(f"{name}: GGUF version must be 2 or 3 (little-endian), got {version}")
        tensors, keys = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise FormatError(
                f"{name}: {tensors} tensors and {keys} keys, the limits are {MAX_TENSORS} and {MAX_KEYS}"
            )
        #: Key -> int, float, bool, str or a list of one of them.
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.string("a key", MAX_NAME)
            if key in self.metadata:
                raise cursor.fail(f"the key {key!r} appears twice")
            self.metadata[key] = cursor.value(cursor.number("I", key), key)
        if self.get("split.count", int, 0) > 1:
            raise UnsupportedError(f"{name} is one part of a split model: merge the parts first")
        #: Tensor name -> where it lies.
        self.tensors: dict[str, TensorInfo] = {}
        self._directory(cursor, tensors)
        self._data = torch.frombuffer(self._map, dtype=torch.uint8)

    def _directory(self, cursor: _Cursor, count: int) -> None:
        for _ in range(count):
            name = cursor.string("a tensor name", MAX_NAME)
            if name in self.tensors:
                raise cursor.fail(f"the tensor {name!r} appears twice")
            rank = cursor.number("I", name)
            if not 1 <= rank <= MAX_DIMS:
                raise cursor.fail(f"{name!r} has {rank} dimensions, 1 to {MAX_DIMS} are accepted")
            dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, name))
            if not all(1 <= d <= MAX_DIM for d in dims):
                raise cursor.fail(f"{name!r} has the impossible shape {list(dims)}")
            kind, offset = cursor.number("I", name), cursor.number("Q", name)
            if kind not in TYPES:
                if kind in _OTHER_TYPES:
                    raise UnsupportedError(
                        f"{self.path.name}: {name!r} has the type {_OTHER_TYPES[kind]}; one of "
                        f"{', '.join(TYPES.values())} would be needed"
                    )
                raise cursor.fail(f"{name!r} has the unknown type {kind}")
            elements, size = GGUF_BLOCKS[TYPES[kind]]
            if dims[0] % elements:
                raise cursor.fail(f"{name!r}: rows of {dims[0]} are no multiple of a block of {elements}")
            nbytes = math.prod(dims) // elements * size
            self.tensors[name] = TensorInfo(TYPES[kind], tuple(reversed(dims)), offset, nbytes)

        alignment = self.get("general.alignment", int, 32)
        if not (8 <= alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0):
            raise cursor.fail(f"general.alignment must be a power of two from 8 up, got {alignment}")
        start = (cursor.at + alignment - 1) // alignment * alignment
        # Overlapping tensors would let a small file ask for much memory.
        last = 0
        for name, info in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            if info.offset % alignment:
                raise cursor.fail(f"{name!r} lies at {info.offset}, not at a multiple of {alignment}")
            if info.offset < last:
                raise cursor.fail(f"{name!r} overlaps the tensor before it")
            last = info.offset + info.nbytes
            if start + last > cursor.end:
                raise cursor.fail(f"{name!r} ends at byte {start + last} of {cursor.end}")
        self._start = start

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value of one type. Raises FormatError when it is missing or another."""
        value = self.metadata.get(key, default)
        if value is None:
            raise FormatError(f"{self.path.name}: the key {key!r} is missing")
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise FormatError(
                f"{self.path.name}: {key!r} must be {kind.__name__}, got {type(value).__name__}"
            )
        return value

    def info(self, name: str) -> TensorInfo:
        """The entry of a tensor. Raises FormatError when there is none."""
        if name not in self.tensors:
            raise FormatError(f"{self.path.name}: the tensor {name!r} is missing")
        return self.tensors[name]

    def blocks(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8 [..., bytes of a row]: a view of the file."""
        info = self.info(name)
        elements, size = GGUF_BLOCKS[info.type]
        at = self._start + info.offset
        shape = (*info.shape[:-1], info.shape[-1] // elements * size)
        return self._data[at : at + info.nbytes].view(shape)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of a tensor in float32, float16 or bfloat16."""
        return torch.ops.narrowcast.dequantize_gguf(self.blocks(name), self.info(name).type, dtype)

    def grouped(self, name: str) -> GroupedWeight | None:
        """A matrix in its own quantised form, or None where that is not one of Q4_0, Q4_1, Q8_0."""
        info = self.info(name)
        if len(info.shape) != 2:
            raise ArgumentError(f"{name!r} must be a matrix, got {list(info.shape)}")
        return from_gguf(self.blocks(name), info.type) if info.type in GGUF_GROUPED else None
