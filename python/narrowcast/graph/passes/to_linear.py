"""aten.linear, addmm, mm and matmul by a constant matrix -> narrowcast.linear; constants added to it."""

from __future__ import annotations

from torch import Tensor, fx

from ..ir import Graph
from .match import LAYERS, Layer, aten, calls, commuted, only_user, ops, same_shape, value


def to_linear(graph: Graph) -> int:
    count = 0
    for node in graph.calls(aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default):
        if node.target is aten.linear.default:
            x, weight, bias = (*node.args, None)[:3]
        elif node.target is aten.addmm.default:
            if node.kwargs:  # alpha, beta
                continue
            bias, x, weight = node.args
            weight = _transposed(graph, weight)
        else:
            x, weight = node.args
            bias, weight = None, _transposed(graph, weight)
        if weight is None or graph.weight(weight) is None or graph.weight(weight).dim() != 2:
            continue
        if bias is not None and (graph.weight(bias) is None or graph.weight(bias).dim() != 1):
            continue
        if value(node) is None or not value(node).dtype.is_floating_point or value(x).dim() < 1:
            continue
        graph.replace(node, graph.add_call(ops.linear.default, (x, weight, bias), like=node))
        count += 1
    return count


def drop_views(graph: Graph) -> int:
    """reshape -> layer -> reshape back becomes the layer alone: it takes any leading sizes."""
    count = 0
    for node in graph.calls(ops.linear.default):
        flat, back = node.args[0], only_user(node)
        if not calls(flat, aten.reshape.default) or not calls(back, aten.reshape.default):
            continue
        x = flat.args[0]
        if any(value(v) is None for v in (x, flat, node, back)):
            continue
        before, after = ([str(size) for size in value(v).shape] for v in (x, back))
        same = before[:-1] == after[:-1] and before[-1] == str(value(flat).shape[-1])
        if not same or after[-1] != str(value(node).shape[-1]):
            continue
        call = graph.add_call(node.target, (x, *node.args[1:]), dict(node.kwargs), like=node)
        graph.replace(back, call)
        count += 1
    graph.clean()
    return count


def fuse_bias(graph: Graph) -> int:
    """layer(x) + constant, one value per output feature, into the layer's bias."""
    count = 0
    for node in graph.calls(aten.add.Tensor):
        for x, constant in commuted(node):
            if node.kwargs or not calls(x, *LAYERS) or only_user(x) is not node:
                continue
            layer, tensor = Layer(x), graph.weight(constant)
            if tensor is None or not _is_per_feature(layer, tensor) or not same_shape(x, node):
                continue
            if layer["activation"] != "none" or layer["residual"] is not None:
                continue
            if tensor.dtype != graph.weight(layer["weight"]).dtype:
                continue
            bias = tensor.reshape(-1)
            if layer["bias"] is not None:
                bias = (bias.double() + graph.weight(layer["bias"]).double()).to(bias.dtype)
            name = layer["weight"].target.removesuffix("weight") + "bias"
            layer.set(bias=graph.add_weight(name, bias.contiguous(), before=x))
            graph.replace(node, x)
            count += 1
            break
    graph.clean()
    return count


def _is_per_feature(layer: Layer, tensor: Tensor) -> bool:
    features = layer["weight"].meta["val"].shape[0]
    axis = -1 if calls(layer.node, ops.linear.default) else -3
    if tensor.dim() < -axis or tensor.numel() != features:
        return False
    return tensor.shape[axis] == features and (value(layer.node).dim() >= tensor.dim())


def _transposed(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The weight [N, K] whose transpose is ``node`` [K, N], made by copying where there is none."""
    if calls(node, aten.t.default):
        return node.args[0]
    if calls(node, aten.transpose.int) and set(node.args[1:]) in ({0, 1}, {-1, -2}):
        return node.args[0]
    if calls(node, aten.permute.default) and list(node.args[1]) == [1, 0]:
        return node.args[0]
    weight = graph.weight(node)
    if weight is None or weight.dim() != 2:
        return None
    return graph.add_weight(f"{node.target}.transposed", weight.t().contiguous(), before=node)
