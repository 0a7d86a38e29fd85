"""Activations written as formulas -> the activation's own call: silu, hardswish, both forms of gelu."""

from __future__ import annotations

import math

from torch import fx

from ..ir import Graph
from .match import aten, calls, scalar, value


def name_activations(graph: Graph) -> int:
    """x * sigmoid(x), x * relu6(x + 3) / 6, x * (1 + erf(x / sqrt 2)) / 2, gelu's tanh form; any order."""
    count = 0
    # From the last product to the first: the outermost one holds all factors.
    for node in reversed(list(graph.calls(aten.mul.Tensor, aten.div.Tensor))):
        if node.users and value(node) is not None:
            call = _activation(graph, node)
            if call is not None and value(call[1]).dtype == value(node).dtype:
                target, x, kwargs = call
                graph.replace(node, graph.add_call(target, (x,), kwargs, like=node))
                count += 1
    graph.clean()
    return count


def _activation(graph: Graph, node: fx.Node) -> tuple | None:
    """(op, x, keyword arguments) of the activation that ``node`` spells out."""
    factors, constant = _product(graph, node)
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        if calls(gate, aten.sigmoid.default) and gate.args[0] is x and constant == 1:
            return aten.silu.default, x, {}
        if calls(gate, aten.hardsigmoid.default) and gate.args[0] is x and constant == 1:
            return aten.hardswish.default, x, {}
        if _is_relu6(gate) and _plus(graph, gate.args[0], 3) is x and _near(constant, 1 / 6):
            return aten.hardswish.default, x, {}
        inner = _plus(graph, gate, 1) if _near(constant, 0.5) else None
        if calls(inner, aten.erf.default):
            if _is_product(graph, inner.args[0], [x], math.sqrt(0.5)):
                return aten.gelu.default, x, {}
        elif calls(inner, aten.tanh.default) and _is_gelu_tanh(graph, inner.args[0], x):
            return aten.gelu.default, x, {"approximate": "tanh"}
    return None


def _is_relu6(node: fx.Node) -> bool:
    if calls(node, aten.relu6.default):
        return True
    return calls(node, aten.hardtanh.default, aten.clamp.default) and tuple(node.args[1:]) == (0, 6)


def _is_gelu_tanh(graph: Graph, node: fx.Node, x: fx.Node) -> bool:
    """sqrt(2 / pi) * (x + 0.044715 * x^3)"""
    factors, constant = _product(graph, node)
    if len(factors) != 1 or not _near(constant, math.sqrt(2 / math.pi)):
        return False
    total = factors[0]
    if not calls(total, aten.add.Tensor) or total.kwargs:
        return False
    a, b = total.args
    return any(p is x and _is_product(graph, cube, [x] * 3, 0.044715) for p, cube in ((a, b), (b, a)))


def _is_product(graph: Graph, node: fx.Node, factors: list[fx.Node], constant: float) -> bool:
    found, scale = _product(graph, node)
    return len(found) == len(factors) and set(found) == set(factors) and _near(scale, constant)


def _product(graph: Graph, node: fx.Node) -> tuple[list[fx.Node], float]:
    """A tree of products as tensors times one number; a shared product counts as a tensor of its own."""
    factors, constant, left = [], 1.0, [(node, True)]
    while left:
        part, may_open = left.pop()
        number = scalar(graph, part)
        if number is not None:
            constant *= number
        elif not isinstance(part, fx.Node):
            return [], 0.0
        elif calls(part, aten.mul.Tensor) and may_open:
            left += [(x, len(getattr(x, "users", ())) == 1) for x in part.args]
        elif calls(part, aten.div.Tensor) and may_open and scalar(graph, part.args[1]):
            constant /= scalar(graph, part.args[1])
            left.append((part.args[0], len(part.args[0].users) == 1))
        elif calls(part, aten.pow.Tensor_Scalar) and part.args[1] in (2, 3):
            factors += [part.args[0]] * int(part.args[1])
        else:
            factors.append(part)
    return factors, constant


def _plus(graph: Graph, node: fx.Node, number: float) -> fx.Node | None:
    """x when ``node`` is x + number."""
    if calls(node, aten.add.Tensor) and not node.kwargs:
        for x, c in (node.args, node.args[::-1]):
            if isinstance(x, fx.Node) and scalar(graph, c) == number:
                return x
    return None


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3)
