"""layer -> activation, and layer + residual -> activation, into the layer's epilogue."""

from __future__ import annotations

from torch import fx

from ..ir import Graph
from .match import LAYERS, Layer, argument, aten, calls, commuted, only_user, same_shape, value

_SIMPLE = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.hardswish.default: "hardswish",
    aten.silu.default: "silu",
}


def activation_name(node: fx.Node) -> str | None:
    """The epilogue that does what ``node`` does, or None."""
    if node.op != "call_function":
        return None
    if node.target in _SIMPLE:
        return _SIMPLE[node.target]
    if node.target is aten.gelu.default:
        return "gelu_tanh" if argument(node, 1, "approximate", "none") == "tanh" else "gelu"
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        bounds = (argument(node, 1, "min", -1.0), argument(node, 2, "max", 1.0))
        return "relu6" if bounds == (0, 6) else None
    if node.target is aten.clamp_min.default:
        return "relu" if node.args[1] == 0 else None
    return None


def fuse_activation(graph: Graph) -> int:
    count = 0
    for node in graph.calls():
        name = activation_name(node)
        if name is None or not calls(node.args[0], *LAYERS) or only_user(node.args[0]) is not node:
            continue
        layer = Layer(node.args[0])
        if layer["residual"] is None and layer["activation"] == "none":
            layer.set(activation=name)
        elif layer["residual"] is not None and layer["post_activation"] == "none":
            layer.set(post_activation=name)
        else:
            continue
        graph.replace(node, layer.node)
        count += 1
    return count


def fuse_residual(graph: Graph) -> int:
    """layer(x) + r, r of the same shape and computed no later than the layer runs."""
    count = 0
    for node in graph.calls(aten.add.Tensor):
        if node.kwargs or len(node.args) != 2:
            continue
        order = {n: i for i, n in enumerate(graph.fx.nodes)}
        candidates = [
            (layer, residual)
            for layer, residual in commuted(node)
            if calls(layer, *LAYERS)
            and only_user(layer) is node
            and isinstance(residual, fx.Node)
            and same_shape(layer, residual)
            and value(layer).dtype == value(residual).dtype
            and Layer(layer)["residual"] is None
            and Layer(layer)["post_activation"] == "none"
        ]
        if not candidates:
            continue
        # The later of two layers takes the sum: its residual is there when it runs.
        layer, residual = max(candidates, key=lambda pair: order[pair[0]])
        if order[residual] > order[layer]:
            node.prepend(layer)
        Layer(layer).set(residual=residual)
        graph.replace(node, layer)
        count += 1
    return count
