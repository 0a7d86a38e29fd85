"""layer_norm, and RMS norms however they are spelled -> narrowcast ops; residual sums joined to them."""

from __future__ import annotations

import operator

from torch import fx

from ..ir import Graph
from .match import LAYERS, argument, aten, calls, commuted, ops, same_shape, value


def fuse_layer_norm(graph: Graph) -> int:
    count = 0
    for node in graph.calls(aten.layer_norm.default):
        x, shape = node.args[:2]
        if len(shape) != 1:
            continue
        weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
        eps = argument(node, 4, "eps", 1e-5)
        graph.replace(node, graph.add_call(ops.layer_norm.default, (x, weight, bias, eps), like=node))
        count += 1
    return count


def fuse_rms_norm(graph: Graph) -> int:
    """weight * (x * rsqrt(mean(x^2) + eps)) and aten.rms_norm."""
    count = 0
    for node in graph.calls(aten.rms_norm.default):
        x, shape = node.args[:2]
        weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
        if len(shape) == 1 and weight is not None and eps is not None:
            graph.replace(node, graph.add_call(ops.rms_norm.default, (x, weight, eps), like=node))
            count += 1
    for node in graph.calls(aten.mul.Tensor):
        for weight, normed in commuted(node):
            tensor = graph.weight(weight)
            matched = _rms(normed) if tensor is not None and tensor.dim() == 1 else None
            if matched and value(matched[0]).shape[-1] == tensor.shape[0]:
                x, eps = matched
                graph.replace(node, graph.add_call(ops.rms_norm.default, (x, weight, eps), like=node))
                count += 1
                break
    graph.clean()
    return count


def _rms(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) when ``node`` is x * rsqrt(mean(x^2, -1) + eps)."""
    if not calls(node, aten.mul.Tensor):
        return None
    for x, factor in commuted(node):
        if not calls(factor, aten.rsqrt.default) or not calls(factor.args[0], aten.add.Tensor):
            continue
        mean, eps = factor.args[0].args[:2]
        if not calls(mean, aten.mean.dim) or not isinstance(eps, float):
            continue
        axes = [a % value(x).dim() for a in mean.args[1]] if value(x) is not None else []
        square = mean.args[0]
        squared = (calls(square, aten.pow.Tensor_Scalar) and square.args == (x, 2)) or (
            calls(square, aten.mul.Tensor) and square.args == (x, x)
        )
        if squared and axes == [value(x).dim() - 1]:
            return x, eps
    return None


def fuse_add_norm(graph: Graph) -> int:
    """norm(a + b) where no layer could take the sum into its epilogue -> add_*_norm."""
    forms = {
        ops.layer_norm.default: ops.add_layer_norm.default,
        ops.rms_norm.default: ops.add_rms_norm.default,
    }
    count = 0
    for node in graph.calls(*forms):
        total = node.args[0]
        if not calls(total, aten.add.Tensor) or total.kwargs or len(total.args) != 2:
            continue
        a, b = total.args
        if not isinstance(b, fx.Node) or not same_shape(a, b) or calls(a, *LAYERS):
            continue
        both = graph.add_call(forms[node.target], (a, b, *node.args[1:]), like=total)
        # The norm moves up to where its sum was computed: its weights must be there already.
        order = {n: i for i, n in enumerate(graph.fx.nodes)}
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and order[operand] > order[both]:
                both.prepend(operand)
        normed = graph.add_call(operator.getitem, (both, 0), like=total)
        summed = graph.add_call(operator.getitem, (both, 1), like=total)
        graph.replace(node, normed)
        graph.replace(total, summed)
        count += 1
    graph.clean()
    return count
