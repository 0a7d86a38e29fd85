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
MAX_DEPTH = 8
MAX_RANK = 8
MAX_SIZE = 2**31

#: ATen ops whose result depends on their arguments only, by what inference graphs use: nothing random, in
#: place or uninitialised. Anything else in a file is refused.
_ATEN = frozenset(
    """
__and__ __or__ __xor__ _log_softmax _native_batch_norm_legit_no_training _safe_softmax _softmax _to_copy
_unsafe_view _weight_norm_interface abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_max_pool2d add addcdiv addcmul addmm alias all amax amin any arange arctan argmax argmin argsort
asin asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and
bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm broadcast_tensors broadcast_to
bucketize cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clone column_stack concat
constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d convolution copy cos cosh
cosine_similarity cross cumprod cumsum deg2rad detach diag_embed diagonal diff div divide dot einsum elu
embedding eq erf erfc erfinv exp exp2 expand expand_as expm1 eye fill flatten flip floor floor_divide fmod
frac full full_like gather ge gelu glu grid_sampler_2d group_norm gt hardshrink hardsigmoid hardswish
hardtanh heaviside hstack im2col index index_add index_copy index_put index_select instance_norm isfinite
isinf isnan layer_norm le leaky_relu lerp lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log
log10 log1p log2 log_sigmoid log_softmax logaddexp logical_and logical_not logical_or logical_xor logsumexp
lt masked_fill masked_scatter matmul max max_pool1d max_pool2d max_pool2d_with_indices maximum mean meshgrid
min minimum mish mm movedim mul multiply mv nan_to_num narrow native_group_norm native_layer_norm ne neg
new_full new_ones new_zeros nonzero norm numel numpy_T one_hot ones ones_like outer pad permute
pixel_shuffle pixel_unshuffle pow prelu prod reciprocal reflection_pad1d reflection_pad2d relu relu6
remainder repeat repeat_interleave replication_pad2d reshape rms_norm roll rot90 round rsqrt rsub
scalar_tensor scaled_dot_product_attention scatter scatter_add searchsorted select select_scatter selu
sigmoid sign silu sin sinh slice slice_scatter softmax softplus sort split split_with_sizes sqrt square
squeeze stack std sub subtract sum swapaxes sym_size t take_along_dim tan tanh tensor_split threshold tile
to topk trace transpose tril triu true_divide trunc type_as unbind unflatten unfold unsqueeze
upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var var_mean view view_as vstack where zeros
zeros_like
""".split()  # noqa: SIM905
)
#: Our ops that compute; the rest of the catalogue steers kernels or is private.
_NARROWCAST = frozenset(
    """
quantize_int8 quantize_int8_asymmetric quantize_int8_static dequantize_int8 dequantize_groups
dequantize_gguf linear linear_int8 linear_int8_requantize linear_dynamic_int8 linear_grouped attention
attention_lse attention_int8 attention_decode kv_append conv2d conv2d_int8 max_pool2d_int8 avg_pool2d_int8
rms_norm add_rms_norm rms_norm_int8 add_rms_norm_int8 layer_norm add_layer_norm layer_norm_int8
add_layer_norm_int8 rope silu_mul silu_mul_int8 gelu_mul gelu_mul_int8
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
            dtype, shape = input_type(node)
            entry["dtype"], entry["shape"] = _dtype_name(dtype), shape
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


def input_type(node: fx.Node) -> tuple[torch.dtype, list[int | str]]:
    """The dtype and the sizes of an input; a size that may vary is the name of its symbol."""
    if "shape" in node.meta:  # read from a file
        return node.meta["dtype"], node.meta["shape"]
    val = node.meta.get("val")
    if not isinstance(val, Tensor):
        raise FormatError(f"input {node.name} has no known type")
    return val.dtype, [s if isinstance(s, int) else str(s) for s in val.shape]


def target_name(target: Any) -> str:
    """``narrowcast.linear.default``, ``aten.add.Tensor``, ``operator.mul``."""
    if isinstance(target, torch._ops.OpOverload) and _may_call(target):
        return str(target)
    for prefix, names in (("operator", _OPERATOR_NAMES), ("math", _MATH_NAMES), ("torch", _FUNCTION_NAMES)):
        if target in names:
            return f"{prefix}.{names[target]}"
    raise FormatError(f"a plan cannot hold a call of {target}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encode(x: Any) -> Any:
    if x is None or isinstance(x, bool | str) or (isinstance(x, int) and abs(x) < 2**63):
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
    if not 1 <= len(entries) <= MAX_NODES:
        raise FormatError(f"graph has {len(entries)} nodes, 1 to {MAX_NODES} are read")
    nodes, known = fx.Graph(), {}
    for entry in entries[:-1]:
        entry = _expect(entry, dict, "node")
        name = _text(entry, "name")
        if name in known:
            raise FormatError(f"two nodes are named {name[:80]}")
        known[name] = _read_node(nodes, entry, name, known, weights)
    last = _expect(entries[-1], dict, "node")
    results = _decode(last.get("args"), known) if last.get("op") == "output" else None
    if not (isinstance(results, tuple) and len(results) == 1 and isinstance(results[0], tuple)):
        raise FormatError("the last node must be the output, with one tuple")
    nodes.output(results[0])
    used = {node.target for node in nodes.nodes if node.op == "get_attr"}
    return Graph(nodes, {name: w for name, w in weights.items() if name in used})


def _read_node(nodes: fx.Graph, entry: dict, name: str, known: dict, weights: dict) -> fx.Node:
    kind, target = _text(entry, "op"), _text(entry, "target")
    if kind == "placeholder":
        node = nodes.create_node("placeholder", target, (), {}, name)
        shape = _expect(entry.get("shape"), list, "shape")
        if len(shape) > MAX_RANK or not all(_is_size(s) for s in shape):
            raise FormatError(f"input {name} has no valid shape")
        node.meta["dtype"], node.meta["shape"] = _dtype(entry.get("dtype")), shape
    elif kind == "get_attr":
        if target not in weights:
            raise FormatError(f"weight {target} is missing")
        node = nodes.create_node("get_attr", target, (), {}, name)
    elif kind == "call_function":
        args = _decode(entry.get("args"), known)
        if not isinstance(args, tuple):
            raise FormatError(f"node {name} has no argument list")
        given = _expect(entry.get("kwargs", {}), dict, "kwargs")
        kwargs = {k: _decode(x, known) for k, x in given.items()}
        function = _target(target)
        _check_arguments(name, target, function, args, kwargs)
        node = nodes.create_node("call_function", function, args, kwargs, name)
        node.meta["source"] = _expect(entry.get("source", ""), str, "source")[:MAX_TEXT]
    else:
        raise FormatError(f"node {name} has unknown kind {kind[:80]!r}")
    if node.name != name:
        raise FormatError(f"{name[:80]!r} is not a valid node name")
    return node


def _is_size(size: Any) -> bool:
    if isinstance(size, str):
        return 0 < len(size) <= MAX_TEXT
    return isinstance(size, int) and not isinstance(size, bool) and 0 <= size < MAX_SIZE


def _may_call(target: torch._ops.OpOverload) -> bool:
    if target.namespace == "narrowcast":
        return target._opname in _NARROWCAST and target._overloadname == "default"
    return target.namespace == "aten" and target._opname in _ATEN and not target._schema.is_mutable


def _target(name: str) -> Any:
    parts = name.split(".")
    if len(parts) == 2:
        table = {"operator": _OPERATORS, "math": _MATH, "torch": _FUNCTIONS}.get(parts[0], {})
        if parts[1] in table:
            return table[parts[1]]
    if len(parts) == 3 and parts[1] in {"narrowcast": _NARROWCAST, "aten": _ATEN}.get(parts[0], ()):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        if packet is not None and parts[2] in packet.overloads():
            overload = getattr(packet, parts[2])
            if _may_call(overload):
                return overload
    raise FormatError(f"op {name[:80]} is not one that a plan may call")


def _check_arguments(name: str, op: str, target: Any, args: tuple, kwargs: dict) -> None:
    """As many arguments as the op takes, under its names; their types are checked when it runs."""
    if not isinstance(target, torch._ops.OpOverload):
        if kwargs or not 1 <= len(args) <= 2:
            raise FormatError(f"node {name}: {op} takes one or two arguments")
        if target is operator.pow and args[-1] not in range(9):  # a size, not a way to run out of memory
            raise FormatError(f"node {name}: {op} takes exponents 0 to 8, got {args[-1]}")
        return
    expected = target._schema.arguments
    positional = [a.name for a in expected if not a.kwarg_only]
    given = [*positional[: len(args)], *kwargs]
    required = [a.name for a in expected if not a.has_default_value()]
    if (
        len(args) > len(positional)
        or len(set(given)) != len(given)
        or not set(given) <= {a.name for a in expected}
        or not set(required) <= set(given)
    ):
        raise FormatError(f"node {name}: the arguments are not those of {target._schema}")


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise FormatError(f"unknown dtype {str(name)[:80]!r}")
    return _DTYPES[name]


def _decode(x: Any, known: dict[str, fx.Node], depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"an argument is nested more than {MAX_DEPTH} deep")
    if isinstance(x, int) and abs(x) >= 2**63:
        raise FormatError("an argument does not fit 64 bits")
    if x is None or isinstance(x, bool | int | float):
        return x
    if isinstance(x, str):
        if len(x) > MAX_TEXT:
            raise FormatError("an argument is a text of more than 4096 characters")
        return x
    if isinstance(x, list):
        if len(x) > MAX_LIST:
            raise FormatError(f"an argument is a list of more than {MAX_LIST} entries")
        return [_decode(y, known, depth + 1) for y in x]
    if isinstance(x, dict) and len(x) == 1:
        ((kind, y),) = x.items()
        try:
            if kind == "node":
                return known[y]
            if kind == "tuple":
                return tuple(_decode(_expect(y, list, "tuple"), known, depth + 1))
            if kind == "dtype":
                return _dtype(y)
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
                return slice(*_decode(_expect(y, list, "slice"), known, depth + 1))
        except (KeyError, TypeError) as error:
            raise FormatError(
                f"an argument refers to {kind[:80]} {str(y)[:80]!r}, which is not known here"
            ) from error
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
