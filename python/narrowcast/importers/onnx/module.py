"""An ONNX graph as an ``nn.Module``: evaluated node by node, constants in advance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.errors import ArgumentError, Error, FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight
from narrowcast.importers.model import Model, describe_file
from narrowcast.importers.torch_module import export

from . import quantized
from .reader import File, Node, read
from .table import TABLE

MAX_CONSTANT_BYTES = 4 << 30

_MORE_OUTPUTS = ("Dropout", "MaxPool", "BatchNormalization")


class OnnxModule(nn.Module):
    """Takes the file's inputs in order, returns its output, or a tuple of them."""

    def __init__(self, file: File):
        super().__init__()
        for node in file.nodes:
            if node.op not in TABLE and node.op != "MatMulNBits":
                raise UnsupportedError(f"node {node.name!r} has the operator {node.op}, which is not known")
        constants: dict[str, Tensor] = dict(file.weights)
        self.nodes: list[Node] = []
        #: What a constant [K, N] was dequantised from, and constants [N, K] of layers.
        forms: dict[str, GroupedWeight | None] = {}
        layers: dict[str, GroupedWeight] = {}
        made = 0
        # What depends on weights only is computed now: shapes stay plain numbers for torch.export.
        for node in file.nodes:
            if node.op == "DequantizeLinear" and node.inputs[0] in file.nibbles:
                node.attributes["four_bits"] = True
            node = _as_layer(node, constants, forms, layers)
            if all(x is None or x in constants for x in node.inputs):
                _remember(node, constants, forms)
                results = _evaluate(node, file.opset, constants)
                constants.update(results)
                made += sum(t.nbytes for t in results.values())
                if made > MAX_CONSTANT_BYTES:
                    raise FormatError(f"the constants take more than {MAX_CONSTANT_BYTES} bytes")
            else:
                self.nodes.append(node)
        self.opset, self.names, self.results = file.opset, list(file.inputs), file.outputs
        used = {x for node in self.nodes for x in node.inputs} | set(file.outputs)
        #: Integers stay outside the graph: they are shapes, axes and indices.
        self.plain = {n: t for n, t in constants.items() if n in used and not t.is_floating_point()}
        self.weights: dict[str, str] = {}
        for name, t in constants.items():
            if name in used and t.is_floating_point():
                self.weights[name] = f"w{len(self.weights)}"
                self.register_buffer(self.weights[name], t.contiguous())
        #: Name of a weight -> what the file holds it in.
        self.native = {own: layers[name] for name, own in self.weights.items() if name in layers}

    def forward(self, *inputs):
        values: dict[str, Any] = dict(self.plain)
        values.update((name, getattr(self, own)) for name, own in self.weights.items())
        values.update(zip(self.names, inputs, strict=True))
        for node in self.nodes:
            values.update(_evaluate(node, self.opset, values))
        missing = [name for name in self.results if name not in values]
        if missing:
            raise UnsupportedError(f"the output {missing[0]!r} is a second result that is not computed")
        results = tuple(values[name] for name in self.results)
        return results[0] if len(results) == 1 else results


def _remember(node: Node, constants: dict[str, Tensor], forms: dict[str, GroupedWeight | None]) -> None:
    """Notes the form of a weight that this node makes of constants."""
    if node.op == "DequantizeLinear" and len(node.inputs) >= 2 and None not in node.inputs[:2]:
        forms[node.outputs[0]] = _guarded(quantized.form, node, node.inputs, constants)
        # The same matrix, as a layer takes it that multiplies by its transpose.
        turned = Node(node.op, node.name, node.inputs, node.outputs, {**node.attributes, "turned": True})
        forms[f"{node.outputs[0]}.t"] = _guarded(quantized.form, turned, node.inputs, constants)
    elif node.op == "Transpose" and node.attributes.get("perm", [1, 0]) == [1, 0] and node.inputs[0] in forms:
        forms[node.outputs[0]] = forms[f"{node.inputs[0]}.t"]
        forms[f"{node.outputs[0]}.t"] = forms[node.inputs[0]]


def _as_layer(
    node: Node,
    constants: dict[str, Tensor],
    forms: dict[str, GroupedWeight | None],
    layers: dict[str, GroupedWeight],
) -> Node:
    """A product by a quantised constant as a layer of its own form; any other node as it is."""
    weight, bias, own = None, None, None
    if node.op == "MatMulNBits":
        given = [x for x in node.inputs[1:5] if x is not None]
        if len(node.inputs) < 3 or any(x not in constants for x in given):
            raise UnsupportedError(f"node {node.name!r} (MatMulNBits): B and scales must be constants")
        own = _guarded(quantized.n_bits, node, node.inputs[1:5], constants)
        weight, bias = f"{node.name}.weight", (*node.inputs, None, None, None, None)[5]
    elif node.op == "MatMul" and len(node.inputs) == 2:
        weight, own = node.inputs[1], forms.get(node.inputs[1] or "")
    elif node.op == "Gemm" and len(node.inputs) in (2, 3):
        a = node.attributes
        bias = (*node.inputs, None)[2]
        plain = a.get("alpha", 1.0) == 1.0 and a.get("beta", 1.0) == 1.0 and not a.get("transA", 0)
        if plain and (bias is None or (bias in constants and constants[bias].dim() == 1)):
            weight = node.inputs[1]
            own = forms.get(f"{weight}.t" if a.get("transB", 0) else weight or "")
    if own is None or node.inputs[0] in constants:
        return node
    name = f"{weight} as a layer"
    if name not in constants:
        constants[name], layers[name] = own.dequantize(), own
    return Node(quantized.LINEAR, node.name, [node.inputs[0], name, bias], node.outputs, {})


def _guarded(function, node: Node, names: list[str | None], constants: dict[str, Tensor]):
    try:
        return function(node, [None if x is None else constants[x] for x in names])
    except Error:
        raise
    except Exception as error:
        text = str(error).partition("\n")[0]
        raise FormatError(f"node {node.name!r} ({node.op}) cannot be evaluated: {text}") from error


def _evaluate(node: Node, opset: int, values: dict[str, Any]) -> dict[str, Tensor]:
    unknown = [x for x in node.inputs if x is not None and x not in values]
    if unknown:
        raise UnsupportedError(f"node {node.name!r} ({node.op}) reads {unknown[0]!r}, which is not computed")
    arguments = [None if x is None else values[x] for x in node.inputs]
    try:
        result = TABLE[node.op](node, opset, *arguments)
    except Error:
        raise
    except Exception as error:
        text = str(error).partition("\n")[0]
        raise FormatError(f"node {node.name!r} ({node.op}) cannot be evaluated: {text}") from error
    results = result if isinstance(result, tuple | list) else (result,)
    wanted = [name for name in node.outputs if name]
    if len(results) < len(wanted) and not (
        node.op in ("Dropout", "MaxPool", "BatchNormalization") and results
    ):
        raise UnsupportedError(f"node {node.name!r} ({node.op}): only {len(results)} outputs are known")
    return dict(zip(wanted, results))


def load(path: str | Path, kind: str | None = None, size: dict[str, int] | None = None) -> Model:
    """Imports an ONNX file of opset 7 or newer.

    kind: "image", "encoder" or "generic"; by default "image" for one float input [N, 3, H, W].
    size: name of a dynamic dimension -> a fixed size for it. The others stay dynamic.

    Raises FormatError for a damaged file, UnsupportedError naming the node for what is not known.
    """
    path = Path(path)
    file = read(path)
    if not file.inputs:
        raise FormatError(f"{path.name} has no inputs")
    module = OnnxModule(file).eval()
    fixed = dict(size or {})
    dims: dict[str, Any] = {}
    inputs, shapes = [], []
    for name, (dtype, sizes) in file.inputs.items():
        if any(isinstance(s, int) and s < 1 for s in sizes):
            raise FormatError(
                f"{path.name}: input {name} has the shape {list(sizes)}, none of it may be below 1"
            )
        example, dynamic = [], {}
        for axis, s in enumerate(sizes):
            if isinstance(s, str) and s not in fixed:
                # Export finds the range itself: a convolution may need a least size.
                dims.setdefault(s, torch.export.Dim.DYNAMIC)
                dynamic[axis] = dims[s]
                # Large enough that no pooling comes down to one, which export would take for fixed.
                example.append((2 if axis == 0 else 256) + list(dims).index(s))
            else:
                example.append(fixed.pop(s) if isinstance(s, str) and s in fixed else s)
        if any(not isinstance(s, int) or s < 1 for s in example):
            raise ArgumentError(f"size must hold positive integers, got {size}")
        inputs.append(torch.zeros(example, dtype=dtype))
        shapes.append(dynamic)
    if fixed:
        raise ArgumentError(f"size names {sorted(fixed)}, dynamic are {sorted(dims)}")
    exported = export(module, tuple(inputs), (tuple(shapes),))
    names = list(file.inputs)
    first = inputs[0]
    if kind is None:
        one_image = (
            len(inputs) == 1 and first.dim() == 4 and first.shape[1] == 3 and first.is_floating_point()
        )
        kind = "image" if one_image else "generic"
    config = {"architecture": "onnx", "opset": file.opset, "inputs": names, "outputs": file.outputs}
    return Model(exported, kind, config, native=module.native, source=describe_file(path))
