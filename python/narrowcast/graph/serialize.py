"""Graph <-> JSON. Reading executes nothing: calls are looked up in a list of allowed ops, never by import."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.errors import FormatError

from .ir import Graph

MAX_NODES = 1_000_000
MAX_TEXT = 4096
MAX_LIST = 4096

#: ATen ops without effects, by what inference graphs use. Anything else in a file is refused.
_ALLOWED_ATEN = frozenset(
    """
__and__ __or__ _softmax _to_copy _unsafe_view abs adaptive_avg_pool2d add add_ addmm alias all amax amin any
arange argmax argmin as_strided atan avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm
bucketize cat ceil celu chunk clamp clamp_ clamp_max clamp_min clone constant_pad_nd contiguous conv1d
conv2d conv3d conv_transpose1d conv_transpose2d convolution cos cumsum detach detach_ diff div div_ dropout
elu embedding empty_like eq erf erfc exp exp2 expand expand_as eye flatten flip floor floor_divide full
full_like gather ge gelu glu group_norm gt hardsigmoid hardswish hardswish_ hardtanh hardtanh_ index
index_put index_select instance_norm isinf isnan layer_norm le leaky_relu lift_fresh_copy linalg_vector_norm
linear log log1p log_softmax logical_and logical_not logical_or logsumexp lt masked_fill masked_fill_ matmul
max max_pool2d max_pool2d_with_indices maximum mean min minimum mish mm movedim mul mul_ narrow
native_group_norm native_layer_norm ne neg new_full new_ones new_zeros norm numel ones ones_like outer pad
permute pixel_shuffle pow prelu reciprocal relu relu6 relu_ remainder repeat repeat_interleave reshape
rms_norm roll rsqrt rsub scalar_tensor scaled_dot_product_attention select sigmoid sign silu silu_ sin slice
slice_scatter softmax softplus split split_with_sizes sqrt square squeeze stack std sub sub_ sum sym_size t
tan tanh tile to topk transpose tril triu type_as unbind unflatten unfold unsqueeze upsample_bilinear2d
upsample_nearest2d var var_mean view view_as where zeros zeros_like
""".split()  # noqa: SIM905
)
_OPERATORS = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "eq", "ne", "lt", "le",
                 "gt", "ge", "pow")
}  # fmt: skip
_OPERATOR_NAMES = {function: name for name, function in _OPERATORS.items()}
_MATH = {"ceil": math.ceil, "floor": math.floor, "trunc": math.trunc, "sqrt": math.sqrt}
_MATH_NAMES = {function: name for name, function in _MATH.items()}
_FUNCTIONS = {
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
    "sym_int": torch.sym_int,
    "sym_not": torch.sym_not,
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}

_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
    torch.int32, torch.int64, torch.bool,
)}  # fmt: skip


# --- writing --------------------------------------------------------------------------------------


def to_json(graph: Graph) -> dict:
    """Nodes in program order, as plain lists, dictionaries, numbers and strings."""
    nodes = []
    for node in graph.fx.nodes:
        entry: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "placeholder":
            entry["target"] = str(node.target)
            val = node.meta.get("val")
            if isinstance(val, Tensor):
                entry["dtype"] = _dtype_name(val.dtype)
                entry["shape"] = [s if isinstance(s, int) else str(s) for s in val.shape]
            elif node.meta.get("dtype") is not None:  # read from a file
                entry["dtype"] = _dtype_name(node.meta["dtype"])
                entry["shape"] = node.meta["shape"]
        elif node.op == "get_attr":
            entry["target"] = node.target
        elif node.op == "call_function":
            entry["target"] = target_name(node.target)
            entry["args"] = _encode(node.args)
            entry["kwargs"] = {name: _encode(x) for name, x in node.kwargs.items()}
            if node.meta.get("source"):
                entry["source"] = node.meta["source"]
        else:
            entry["args"] = _encode(node.args)
        nodes.append(entry)
    return {"nodes": nodes}


def target_name(target: Any) -> str:
    """``narrowcast.linear.default``, ``aten.add.Tensor``, ``operator.mul``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for prefix, names in (("operator", _OPERATOR_NAMES), ("math", _MATH_NAMES), ("torch", _FUNCTION_NAMES)):
        if target in names:
            return f"{prefix}.{names[target]}"
    raise FormatError(f"a plan cannot hold a call of {target}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encode(x: Any) -> Any:
    if x is None or isinstance(x, bool | int | str):
        return x
    if isinstance(x, float):  # JSON knows no infinities
        return x if math.isfinite(x) else {"float": str(x)}
    if isinstance(x, fx.Node):
        return {"node": x.name}
    if isinstance(x, list):
        return [_encode(y) for y in x]
    if isinstance(x, tuple):
        return {"tuple": [_encode(y) for y in x]}
    if isinstance(x, torch.dtype):
        return {"dtype": _dtype_name(x)}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if isinstance(x, torch.layout):
        return {"layout": str(x).removeprefix("torch.")}
    if isinstance(x, torch.memory_format):
        return {"memory_format": str(x).removeprefix("torch.")}
    if isinstance(x, slice):
        return {"slice": [_encode(y) for y in (x.start, x.stop, x.step)]}
    raise FormatError(f"a plan cannot hold an argument of type {type(x).__name__}")


# --- reading --------------------------------------------------------------------------------------


def from_json(data: Any, weights: dict[str, Tensor]) -> Graph:
    """The graph of :func:`to_json`. Raises FormatError for anything that it would not have written."""
    entries = _expect(_expect(data, dict, "graph").get("nodes"), list, "nodes")
    if len(entries) > MAX_NODES:
        raise FormatError(f"graph has {len(entries)} nodes, at most {MAX_NODES} are read")
    nodes, known = fx.Graph(), {}
    for position, entry in enumerate(entries):
        entry = _expect(entry, dict, "node")
        kind, name = _text(entry, "op"), _text(entry, "name")
        if name in known:
            raise FormatError(f"two nodes are named {name}")
        if kind == "output":
            if position != len(entries) - 1:
                raise FormatError("the output must be the last node")
            results = _decode(entry.get("args"), known)
            if not (isinstance(results, tuple) and len(results) == 1 and isinstance(results[0], tuple)):
                raise FormatError("the output must be one tuple")
            nodes.output(results[0])
            break
        known[name] = _read_node(nodes, entry, kind, name, known, weights)
    else:
        raise FormatError("the graph has no output")
    used = {node.target for node in nodes.nodes if node.op == "get_attr"}
    graph = Graph(nodes, {w: weights[w] for w in weights if w in used})
    try:
        graph.fx.lint()
    except RuntimeError as error:
        raise FormatError(f"graph is not well formed: {error}") from error
    return graph


def _read_node(nodes: fx.Graph, entry: dict, kind: str, name: str, known: dict, weights: dict) -> fx.Node:
    if kind == "placeholder":
        node = nodes.create_node("placeholder", _text(entry, "target"), (), {}, name)
        node.meta["dtype"] = _decode({"dtype": entry.get("dtype")}, known) if "dtype" in entry else None
        shape = _expect(entry.get("shape", []), list, "shape")
        if len(shape) > 8 or not all(isinstance(s, int | str) for s in shape):
            raise FormatError(f"input {name} has no valid shape")
        node.meta["shape"] = shape
    elif kind == "get_attr":
        target = _text(entry, "target")
        if target not in weights:
            raise FormatError(f"weight {target} is missing")
        node = nodes.create_node("get_attr", target, (), {}, name)
    elif kind == "call_function":
        args = _decode(entry.get("args"), known)
        if not isinstance(args, tuple):
            raise FormatError(f"node {name} has no argument list")
        given = _expect(entry.get("kwargs", {}), dict, "kwargs")
        kwargs = {k: _decode(x, known) for k, x in given.items()}
        node = nodes.create_node("call_function", _target(_text(entry, "target")), args, kwargs, name)
        node.meta["source"] = str(entry.get("source", ""))[:MAX_TEXT]
    else:
        raise FormatError(f"node {name} has unknown kind {kind!r}")
    if node.name != name:
        raise FormatError(f"{name!r} is not a valid node name")
    return node


def _target(name: str) -> Any:
    parts = name.split(".")
    if len(parts) == 2:
        table = {"operator": _OPERATORS, "math": _MATH, "torch": _FUNCTIONS}.get(parts[0], {})
        if parts[1] in table:
            return table[parts[1]]
    if len(parts) == 3 and (parts[0] == "narrowcast" or (parts[0] == "aten" and parts[1] in _ALLOWED_ATEN)):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        if packet is not None and parts[2] in packet.overloads() and not parts[1].startswith("_force"):
            return getattr(packet, parts[2])
    raise FormatError(f"op {name} is not one that a plan may call")


def _decode(x: Any, known: dict[str, fx.Node]) -> Any:
    if x is None or isinstance(x, bool | int | float):
        return x
    if isinstance(x, str):
        if len(x) > MAX_TEXT:
            raise FormatError("an argument is a text of more than 4096 characters")
        return x
    if isinstance(x, list):
        if len(x) > MAX_LIST:
            raise FormatError(f"an argument is a list of more than {MAX_LIST} entries")
        return [_decode(y, known) for y in x]
    if isinstance(x, dict) and len(x) == 1:
        ((kind, y),) = x.items()
        try:
            if kind == "node":
                return known[y]
            if kind == "tuple":
                return tuple(_decode(_expect(y, list, "tuple"), known))
            if kind == "dtype":
                return _DTYPES[y]
            if kind == "float":
                return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[y]
            if kind == "device":
                return {"cpu": torch.device("cpu"), "cuda": torch.device("cuda")}[y]
            if kind == "layout":
                return {"strided": torch.strided}[y]
            if kind == "memory_format":
                return {
                    "contiguous_format": torch.contiguous_format,
                    "channels_last": torch.channels_last,
                    "preserve_format": torch.preserve_format,
                }[y]
            if kind == "slice":
                return slice(*_decode(_expect(y, list, "slice"), known))
        except (KeyError, TypeError) as error:
            raise FormatError(f"an argument refers to {kind} {y!r}, which is not known here") from error
    raise FormatError(f"an argument has an unknown form: {str(x)[:80]}")


def _expect(x: Any, kind: type, what: str) -> Any:
    if not isinstance(x, kind):
        raise FormatError(f"{what} must be a {kind.__name__}, got {type(x).__name__}")
    return x


def _text(entry: dict, key: str) -> str:
    text = entry.get(key)
    if not isinstance(text, str) or not text or len(text) > MAX_TEXT:
        raise FormatError(f"a node has no valid {key}")
    return text
