"""A compressed network as an ONNX file in QDQ form: every int8 edge a pair of QuantizeLinear and DequantizeLinear.

Weights are int8 with a scale per output channel (axis 0 of a convolution, axis 1 of a product), edges uint8 or int8
with one scale. Layers whose inputs become int8 while they run keep int8 weights and float inputs. Opset 21; files
are written by the package ``onnx``. Semantics: docs/Operators.md of ONNX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.errors import UnsupportedError
from narrowcast.files import atomic_path
from narrowcast.graph import Graph, Plan
from narrowcast.graph.int4_codes import resolved
from narrowcast.graph.passes.match import value

aten = torch.ops.aten
ops = torch.ops.narrowcast

OPSET = 21
_ELEMENTS = {torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7}


def write_onnx(path: str | Path, model: Plan | Graph) -> None:
    """Writes one file, inputs and outputs as the graph has them.

    Raises UnsupportedError naming the first call that has no ONNX form here (language models have such calls).
    """
    try:
        import onnx
    except ImportError:
        raise UnsupportedError("an ONNX file needs the package onnx: pip install narrowcast[onnx]") from None
    graph = model.graph if isinstance(model, Plan) else model
    # Codes of 4 bits are written as int8.
    writer = _Writer(onnx, Graph(*resolved(graph.fx, graph.weights)))
    proto = onnx.shape_inference.infer_shapes(writer.model(), strict_mode=True)
    onnx.checker.check_model(proto)
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())


class _Writer:
    """Walks the graph once; ``names`` holds the ONNX value of every node."""

    def __init__(self, onnx: Any, graph: Graph):
        self.helper, self.numpy, self.graph = onnx.helper, onnx.numpy_helper, graph
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self.names: dict[fx.Node, str] = {}
        #: Values that are codes on a grid.
        self.grids: dict[str, torch.dtype] = {}

    def model(self) -> Any:
        inputs = []
        for node in self.graph.fx.nodes:
            if node.op == "placeholder":
                val = node.meta["val"]
                shape = [s if isinstance(s, int) else f"{node.name}_{i}" for i, s in enumerate(val.shape)]
                kind = _ELEMENTS[val.dtype]
                inputs.append(self.helper.make_tensor_value_info(node.name, kind, shape))
                self.names[node] = node.name
            elif node.op == "call_function":
                call = _CALLS.get(node.target)
                if call is None:
                    raise UnsupportedError(f"{node.name} ({node.target}) has no form in ONNX here")
                given = node.target._schema.arguments
                arguments = {a.name: a.default_value for a in given if a.has_default_value()}
                arguments |= dict(zip((a.name for a in given), node.args)) | dict(node.kwargs)
                self.names[node] = call(self, node, arguments)
        outputs = [
            self.helper.make_tensor_value_info(self.names[node], _ELEMENTS[torch.float32], None)
            for node in self.graph.outputs
        ]
        graph = self.helper.make_graph(self.nodes, "narrowcast", inputs, outputs, list(self.weights.values()))
        # The version of the format that opset 21 came with: older readers take it.
        opsets = [self.helper.make_opsetid("", OPSET)]
        return self.helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def constant(self, name: str, tensor: Tensor) -> str:
        if name not in self.weights:
            self.weights[name] = self.numpy.from_array(tensor.detach().contiguous().numpy(), name)
        return name

    def tensor(self, node: fx.Node, dtype: torch.dtype | None = None) -> str:
        """The value of a node: a weight in float32 if need be, or what a call made."""
        if node.op == "get_attr":
            weight = self.graph.weights[node.target]
            return self.constant(node.target, weight if dtype is None else weight.to(dtype))
        return self.names[node]

    def call(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def _grid(self, scale: float, zero: int, dtype: torch.dtype) -> list[str]:
        kind = str(dtype).removeprefix("torch.")
        return [
            self.constant(f"scale_{scale!r}", torch.tensor(scale)),
            self.constant(f"zero_{kind}_{zero}", torch.tensor(zero, dtype=dtype)),
        ]

    def quantize(self, x: str, scale: float, zero: int, dtype: torch.dtype) -> str:
        name = self.call("QuantizeLinear", [x, *self._grid(scale, zero, dtype)])
        self.grids[name] = dtype
        return name

    def dequantize(self, node: fx.Node, scale: float, zero: int) -> str:
        """A node's value in float, whether it is one or lies on a grid."""
        name = self.tensor(node)
        if name not in self.grids:
            return name
        return self.call("DequantizeLinear", [name, *self._grid(scale, zero, self.grids[name])])

    def rows(self, q: fx.Node, scale: fx.Node) -> str:
        """An int8 weight in float, axis 0 its outputs."""
        return self.call("DequantizeLinear", [self.tensor(q), self.tensor(scale)], axis=0)

    def activation(self, x: str, name: str) -> str:
        if name == "none":
            return x
        if name == "relu6":
            bounds = [self.constant(f"bound_{v}", torch.tensor(float(v))) for v in (0, 6)]
            return self.call("Clip", [x, *bounds])
        if name == "silu":
            return self.call("Mul", [x, self.call("Sigmoid", [x])])
        if name in ("gelu", "gelu_tanh"):
            return self.call("Gelu", [x], approximate="tanh" if name == "gelu_tanh" else "none")
        return self.call({"relu": "Relu", "hardswish": "HardSwish"}[name], [x])

    def epilogue(self, y: str, a: dict[str, Any], residual: str | None) -> str:
        y = self.activation(y, a["activation"])
        y = y if residual is None else self.call("Add", [y, residual])
        return self.activation(y, a["post_activation"])


def _pair(values: Any, default: int) -> list[int]:
    values = list(values or [default])
    return values * 2 if len(values) == 1 else values


def _window(a: dict[str, Any]) -> dict[str, Any]:
    padding = _pair(a["padding"], 0)
    return {
        "strides": _pair(a["stride"], 1),
        "pads": padding if len(padding) == 4 else padding * 2,
        "dilations": _pair(a["dilation"], 1),
    }


def _quantize_static(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    return w.quantize(w.tensor(a["x"]), a["scale"], a["zero_point"], a["dtype"])


def _dequantize(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    scale, zero = w.graph.weight(a["scale"]), w.graph.weight(a["zero_point"])
    if scale is None or scale.numel() != 1 or a["group_size"]:
        raise UnsupportedError(f"{node.name}: ONNX edges have one scale")
    return w.dequantize(a["q"], float(scale), 0 if zero is None else int(zero))


def _conv_int8(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    inputs = [w.dequantize(a["x_q"], a["x_scale"], a["x_zero_point"]), w.rows(a["w_q"], a["w_scale"])]
    inputs += [] if a["bias"] is None else [w.tensor(a["bias"], torch.float32)]
    y = w.call("Conv", inputs, group=a["groups"], **_window(a))
    residual = None
    if a["residual"] is not None:
        residual = w.dequantize(a["residual"], a["residual_scale"], a["residual_zero_point"])
    y = w.epilogue(y, a, residual)
    if a["out_scale"] == 0.0:
        return y
    return w.quantize(y, a["out_scale"], a["out_zero_point"], a["out_dtype"] or torch.uint8)


def _conv(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    inputs = [w.tensor(a["x"]), w.tensor(a["weight"], torch.float32)]
    inputs += [] if a["bias"] is None else [w.tensor(a["bias"], torch.float32)]
    y = w.call("Conv", inputs, group=a["groups"], **_window(a))
    return w.epilogue(y, a, None if a["residual"] is None else w.tensor(a["residual"]))


def _linear(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    if "w_q" in a:
        weight = w.rows(a["w_q"], a["w_scale"])
    else:
        weight = w.tensor(a["weight"], torch.float32)
    y = w.call("MatMul", [w.tensor(a["x"]), w.call("Transpose", [weight], perm=[1, 0])])
    if a["bias"] is not None:
        y = w.call("Add", [y, w.tensor(a["bias"], torch.float32)])
    return w.epilogue(y, a, None if a["residual"] is None else w.tensor(a["residual"]))


def _max_pool(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    kernel = _pair(a["kernel_size"], 1)
    window = _window({**a, "stride": a["stride"] or kernel})
    x = w.tensor(a["x_q"] if "x_q" in a else a["self"])
    name = w.call("MaxPool", [x], kernel_shape=kernel, ceil_mode=int(a["ceil_mode"]), **window)
    if x in w.grids:
        w.grids[name] = w.grids[x]
    return name


def _average_pool_int8(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    x = w.dequantize(a["x_q"], a["x_scale"], a["x_zero_point"])
    if a["kernel_size"]:
        kernel = _pair(a["kernel_size"], 1)
        strides, pads = _pair(a["stride"] or kernel, 1), _pair(a["padding"], 0) * 2
        y = w.call("AveragePool", [x], kernel_shape=kernel, strides=strides, pads=pads)
    else:
        y = w.call("GlobalAveragePool", [x])
    if a["out_scale"] == 0.0:
        return y
    return w.quantize(y, a["out_scale"], a["out_zero_point"], a["out_dtype"] or torch.uint8)


def _mean(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    axes = w.constant(f"{node.name}_axes", torch.tensor(list(a["dim"]), dtype=torch.int64))
    return w.call("ReduceMean", [w.tensor(a["self"]), axes], keepdims=int(a["keepdim"]))


def _flatten(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    if a["start_dim"] != 1 or a["end_dim"] not in (-1, value(a["self"]).dim() - 1):
        raise UnsupportedError(f"{node.name}: ONNX flattens all but the first dimension")
    return w.call("Flatten", [w.tensor(a["self"])], axis=1)


def _global_average(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    if list(a["output_size"]) != [1, 1]:
        raise UnsupportedError(f"{node.name}: ONNX has no adaptive pooling to {list(a['output_size'])}")
    return w.call("GlobalAveragePool", [w.tensor(a["self"])])


def _add(w: _Writer, node: fx.Node, a: dict[str, Any]) -> str:
    if a["alpha"] != 1 or not isinstance(a["other"], fx.Node):
        raise UnsupportedError(f"{node.name}: only the sum of two tensors has a form in ONNX here")
    return w.call("Add", [w.tensor(a["self"]), w.tensor(a["other"])])


_CALLS = {
    ops.quantize_int8_static.default: _quantize_static,
    ops.dequantize_int8.default: _dequantize,
    ops.conv2d_int8.default: _conv_int8,
    ops.conv2d.default: _conv,
    ops.linear.default: _linear,
    ops.linear_dynamic_int8.default: _linear,
    ops.max_pool2d_int8.default: _max_pool,
    ops.avg_pool2d_int8.default: _average_pool_int8,
    aten.max_pool2d.default: _max_pool,
    aten.mean.dim: _mean,
    aten.flatten.using_ints: _flatten,
    aten.adaptive_avg_pool2d.default: _global_average,
    aten.add.Tensor: _add,
    aten.relu.default: lambda w, node, a: w.call("Relu", [w.tensor(a["self"])]),
}
