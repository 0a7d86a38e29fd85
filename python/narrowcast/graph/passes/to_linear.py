"""aten.linear, addmm, mm and matmul by a constant matrix -> narrowcast.linear."""

from __future__ import annotations

from torch import fx

from ..ir import Graph
from .match import aten, calls, ops, value


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
