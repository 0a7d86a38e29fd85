"""From the bytes of an ONNX file to plain nodes and tensors; nothing in the file is trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError

MIN_OPSET, MAX_FILE = 7, 2 << 30
MAX_NODES, MAX_RANK, MAX_DIM, MAX_ATTRIBUTE = 1 << 20, 8, (1 << 31) - 1, 1 << 20

#: TensorProto.DataType -> dtype.
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip

#: Four bits, two to a byte, the first one low: unsigned and signed.
_NIBBLES = {21: torch.uint8, 22: torch.int8}

#: Operators of com.microsoft that are known, by the names they have here.
_CONTRIBUTED = ("MatMulNBits", "QuantizeLinear", "DequantizeLinear")

# Where a tensor keeps its values when they are not raw bytes.
_FIELDS = {1: "float_data", 7: "int64_data", 11: "double_data"}


@dataclass
class Node:
    """One operation: its inputs may be None where an optional one is left out."""

    op: str
    name: str
    inputs: list[str | None]
    outputs: list[str]
    attributes: dict[str, Any]


@dataclass
class File:
    """A checked graph: nodes in an order in which every input exists before it is used."""

    opset: int
    nodes: list[Node]
    weights: dict[str, Tensor]
    #: Names of the weights that are codes of four bits, each in a byte here.
    nibbles: set[str]
    #: name -> (dtype, sizes: an int, or the name of a dynamic size).
    inputs: dict[str, tuple[torch.dtype, list[int | str]]]
    outputs: list[str]
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> File:
    """Reads a file. Raises FormatError or UnsupportedError."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise UnsupportedError("an ONNX file needs the package onnx: pip install narrowcast[onnx]") from None
    if path.stat().st_size > MAX_FILE:
        raise FormatError(f"{path.name} is larger than {MAX_FILE} bytes, which protobuf cannot hold")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{path.name} is no ONNX file: {error}") from error
    graph = proto.graph
    if not graph.node or not graph.output:
        raise FormatError(f"{path.name} is no ONNX file: it has no nodes or no outputs")
    if len(graph.node) > MAX_NODES:
        raise FormatError(f"{path.name} has {len(graph.node)} nodes, at most {MAX_NODES} are accepted")
    opsets = {o.domain or "ai.onnx": o.version for o in proto.opset_import}
    opset = opsets.get("ai.onnx", 0)
    if opset < MIN_OPSET:
        raise UnsupportedError(f"{path.name}: the opset must be {MIN_OPSET} or newer, got {opset}")
    if proto.functions:
        raise UnsupportedError(f"{path.name}: functions inside the file are not supported")

    weights: dict[str, Tensor] = {}
    for t in graph.initializer:
        _define(weights, t.name, path)
        weights[t.name] = tensor(t, path.name, path.parent)
    if graph.sparse_initializer:
        raise UnsupportedError(f"{path.name}: sparse weights are not supported")
    inputs = {i.name: _type(i, path.name) for i in graph.input if i.name not in weights}
    known = {*weights, *inputs}
    nodes = []
    for n in graph.node:
        name = n.name or (n.output[0] if n.output else n.op_type)
        known_here = n.domain == "com.microsoft" and n.op_type in _CONTRIBUTED
        if n.domain not in ("", "ai.onnx") and not known_here:
            raise UnsupportedError(f"{path.name}: node {name!r} is {n.domain}.{n.op_type}, not known here")
        missing = [x for x in n.input if x and x not in known]
        if missing:
            raise FormatError(f"{path.name}: node {name!r} ({n.op_type}) reads {missing[0]!r} too early")
        for x in n.output:
            if x in known:
                raise FormatError(f"{path.name}: {x!r} is made twice")
        known.update(x for x in n.output if x)
        attributes = {a.name: _attribute(a, name, path) for a in n.attribute}
        nodes.append(Node(n.op_type, name, [x or None for x in n.input], list(n.output), attributes))
    outputs = [o.name for o in graph.output]
    for name in outputs:
        if name not in known:
            raise FormatError(f"{path.name}: the output {name!r} is never made")
    nibbles = {t.name for t in graph.initializer if t.data_type in _NIBBLES}
    return File(opset, nodes, weights, nibbles, inputs, outputs)


def _define(weights: dict[str, Tensor], name: str, path: Path) -> None:
    if not name or name in weights:
        raise FormatError(f"{path.name}: the weight {name!r} has no name or appears twice")


def tensor(t, file: str, folder: Path | None) -> Tensor:
    """A TensorProto as a tensor that owns its memory."""
    dims = list(t.dims)
    if len(dims) > MAX_RANK or not all(0 <= d <= MAX_DIM for d in dims):
        raise FormatError(f"{file}: {t.name!r} has the impossible shape {dims}")
    if t.data_type in _NIBBLES:
        return _nibbles(t, file, folder, dims)
    if t.data_type not in DTYPES:
        raise UnsupportedError(f"{file}: {t.name!r} has the data type {t.data_type}, which is not known")
    dtype = DTYPES[t.data_type]
    expected = math.prod(dims) * dtype.itemsize
    if t.data_location == 1:
        raw = _external(t, file, folder, expected)
    elif t.HasField("raw_data"):
        raw = t.raw_data
    else:
        values = getattr(t, _FIELDS.get(t.data_type, "int32_data"))
        if len(values) != math.prod(dims):
            raise FormatError(f"{file}: {t.name!r} has {len(values)} values for the shape {dims}")
        if dtype in (torch.float16, torch.bfloat16):
            bits = torch.tensor(list(values), dtype=torch.int32).to(torch.int16)
            return bits.view(dtype).reshape(dims)
        return torch.tensor(list(values), dtype=dtype).reshape(dims)
    if len(raw) != expected:
        raise FormatError(f"{file}: {t.name!r} has {len(raw)} bytes, its shape {dims} needs {expected}")
    if expected == 0:
        return torch.empty(dims, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(dims)


def _nibbles(t, file: str, folder: Path | None, dims: list[int]) -> Tensor:
    count = math.prod(dims)
    expected = (count + 1) // 2
    if t.data_location == 1:
        raw = _external(t, file, folder, expected)
    else:
        raw = t.raw_data if t.HasField("raw_data") else bytes(v & 255 for v in t.int32_data)
    if len(raw) != expected:
        raise FormatError(f"{file}: {t.name!r} has {len(raw)} bytes, its shape {dims} needs {expected}")
    if not count:
        return torch.empty(dims, dtype=_NIBBLES[t.data_type])
    packed = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten()[:count].reshape(dims)
    return codes if t.data_type == 21 else ((codes ^ 8) - 8).view(torch.int8)


def _external(t, file: str, folder: Path | None, expected: int) -> bytes:
    """The bytes of a tensor in a file beside the model: inside its folder, no links, no more than needed."""
    entries = {e.key: e.value for e in t.external_data}
    location = entries.get("location", "")
    if folder is None or not location:
        raise FormatError(f"{file}: {t.name!r} lies in another file that is not named")
    inside = Path(location)
    if inside.is_absolute() or ".." in inside.parts:
        raise FormatError(f"{file}: {t.name!r} lies at {location!r}, outside the folder of the model")
    steps = [folder.joinpath(*inside.parts[: i + 1]) for i in range(len(inside.parts))]
    if any(s.is_symlink() for s in steps) or not steps[-1].is_file() or steps[-1].stat().st_nlink > 1:
        raise FormatError(f"{file}: {t.name!r} lies at {location!r}, which must be a file, no link")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError:
        raise FormatError(f"{file}: {t.name!r} has an offset or a length that is no number") from None
    if offset < 0 or length != expected or offset + length > steps[-1].stat().st_size:
        raise FormatError(f"{file}: {t.name!r} needs {expected} bytes at {offset} of {location!r}")
    with open(steps[-1], "rb") as f:
        f.seek(offset)
        return f.read(length)


def _type(value, file: str) -> tuple[torch.dtype, list[int | str]]:
    kind = value.type.tensor_type
    if kind.elem_type not in DTYPES:
        raise UnsupportedError(f"{file}: the input {value.name!r} must be a tensor of a known type")
    sizes: list[int | str] = []
    for i, d in enumerate(kind.shape.dim):
        if d.WhichOneof("value") == "dim_value" and d.dim_value > 0:
            sizes.append(d.dim_value)
        else:
            sizes.append(d.dim_param or f"{value.name}_{i}")
    if len(sizes) > MAX_RANK or any(isinstance(s, int) and s > MAX_DIM for s in sizes):
        raise FormatError(f"{file}: the input {value.name!r} has the impossible shape {sizes}")
    return DTYPES[kind.elem_type], sizes


def _attribute(a, node: str, path: Path) -> Any:
    kind = a.type
    if kind == 1:
        return a.f
    if kind == 2:
        return a.i
    if kind == 3:
        return a.s.decode("utf-8", "replace")
    if kind == 4:
        return tensor(a.t, path.name, path.parent)
    values = {6: a.floats, 7: a.ints}.get(kind)
    if values is None:
        raise UnsupportedError(
            f"{path.name}: the attribute {a.name!r} of node {node!r} is of an unknown kind"
        )
    if len(values) > MAX_ATTRIBUTE:
        raise FormatError(f"{path.name}: the attribute {a.name!r} of node {node!r} has {len(values)} values")
    return list(values)
