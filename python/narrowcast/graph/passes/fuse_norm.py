"""layer_norm, and RMS norms however they are spelled -> narrowcast ops; residual sums joined to them."""

from __future__ import annotations

import operator

from torch import fx

from ..ir import Graph
from .match import (
    CASTS,
    LAYERS,
    argument,
    aten,
    calls,
    commuted,
    only_user,
    ops,
    same_shape,
    uncast,
    value,
)  # fmt: skip


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


def fuse_written_layer_norm(graph: Graph) -> int:
    """(x - mean(x)) / sqrt(var(x) + eps) [* weight] [+ bias], as ONNX files spell it."""
    count = 0
    for node in graph.calls(aten.mul.Tensor, aten.div.Tensor):
        matched = _standardised(node)
        if matched is None or value(matched[0]).dtype != value(node).dtype:
            continue
        x, eps = matched
        last, parameters = node, []
        for op in (aten.mul.Tensor, aten.add.Tensor):
            user = only_user(last)
            parameter = _parameter(graph, user, last, x) if calls(user, op) and not user.kwargs else None
            parameters.append(parameter)
            if parameter is not None:
                last = user
        graph.replace(last, graph.add_call(ops.layer_norm.default, (x, *parameters, eps), like=last))
        count += 1
    graph.clean()
    return count


def _parameter(graph: Graph, call: fx.Node, normed: fx.Node, x: fx.Node) -> fx.Node | None:
    """The weight or bias that ``call`` applies to ``normed``."""
    for a, b in commuted(call):
        tensor = graph.weight(b)
        if a is normed and tensor is not None and tensor.shape == value(x).shape[-1:]:
            return b
    return None


def _standardised(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) when ``node`` is (x - mean(x)) / sqrt(var(x) + eps)."""
    if calls(node, aten.div.Tensor):
        centred, root = node.args[:2]
        pairs = [(centred, root)] if calls(root, aten.sqrt.default) else []
    else:
        pairs = [(a, b) for a, b in commuted(node) if calls(b, aten.rsqrt.default)]
    for centred, root in pairs:
        inside = root.args[0]
        if not calls(centred, aten.sub.Tensor) or centred.kwargs or not calls(inside, aten.add.Tensor):
            continue
        x, mean = centred.args[:2]
        variance, eps = inside.args[:2]
        if not calls(mean, aten.mean.dim) or mean.args[0] is not x or not _over_last(mean, x):
            continue
        if not isinstance(eps, float) or inside.kwargs:
            continue
        if (
            calls(variance, aten.mean.dim)
            and _over_last(variance, x)
            and _is_square(variance.args[0], centred)
        ):
            return x, eps
        if _is_variance(variance, x):
            return x, eps
    return None


def fuse_rms_norm(graph: Graph) -> int:
    """weight * (x * rsqrt(mean(x^2) + eps)) and aten.rms_norm, with the casts around it in half precision."""
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
            matched = _rms(uncast(normed)) if tensor is not None and tensor.dim() == 1 else None
            if matched is None or value(matched[0]).shape[-1] != tensor.shape[0]:
                continue
            x, eps = matched
            last, inner = node, uncast(x)
            if value(last).dtype != value(inner).dtype and calls(only_user(node), *CASTS):
                last = only_user(node)  # the product is cast back, not its factor
            if value(last).dtype == value(inner).dtype:
                x = inner
            elif value(node).dtype == value(x).dtype:
                last = node
            else:
                continue
            graph.replace(last, graph.add_call(ops.rms_norm.default, (x, weight, eps), like=last))
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
        if not calls(mean, aten.mean.dim) or not isinstance(eps, float) or value(x) is None:
            continue
        if _is_square(mean.args[0], x) and _over_last(mean, x):
            return x, eps
    return None


def _is_square(node: fx.Node, x: fx.Node) -> bool:
    if calls(node, aten.pow.Tensor_Scalar):
        return node.args == (x, 2)
    return calls(node, aten.mul.Tensor) and node.args == (x, x)


def _is_variance(node: fx.Node, x: fx.Node) -> bool:
    """Whether ``node`` is the biased variance of ``x`` over its last dimension, kept."""
    if calls(node, aten.var.correction):
        return node.args[0] is x and node.kwargs.get("correction") == 0 and _over_last(node, x)
    if not calls(node, aten.var.dim) or node.args[0] is not x or argument(node, 2, "unbiased", True):
        return False
    rank = value(x).dim()
    return bool(argument(node, 3, "keepdim")) and [a % rank for a in node.args[1]] == [rank - 1]


def _over_last(reduction: fx.Node, x: fx.Node) -> bool:
    """Whether a mean or variance runs over the last dimension of ``x`` and keeps it."""
    axes = argument(reduction, 1, "dim") or ()
    keeps = argument(reduction, 2, "keepdim", False)
    return bool(keeps) and [a % value(x).dim() for a in axes] == [value(x).dim() - 1]


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
