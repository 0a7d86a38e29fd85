"""Constant folding and common subexpressions."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..ir import MUTATING, Graph, is_size_call
from .match import is_view

#: A folded constant may be this much larger than what it was computed from.
_GROWTH_LIMIT = 1 << 22


def fold_constants(graph: Graph) -> int:
    """Calls whose tensors are all weights are computed once. Quantised layers and large results stay."""
    count = 0
    for node in graph.calls():
        inputs = node.all_input_nodes
        if not inputs or node.target in MUTATING or is_size_call(node):
            continue
        if any(x.op != "get_attr" for x in inputs):
            continue
        args = fx.map_arg(node.args, lambda n: graph.weights[n.target])
        kwargs = fx.map_arg(node.kwargs, lambda n: graph.weights[n.target])
        with torch.no_grad():
            result = node.target(*args, **kwargs)
        if not isinstance(result, Tensor):
            continue
        before = sum(graph.weights[x.target].nbytes for x in inputs)
        if result.nbytes > before + _GROWTH_LIMIT:
            continue
        name = f"{inputs[0].target}.{node.name}"
        graph.replace(node, graph.add_weight(name, result.contiguous(), before=node))
        count += 1
    graph.clean()
    return count


def share_equal_calls(graph: Graph) -> int:
    """Two equal calls of equal arguments become one; calls with effects, and what reads a cache, never."""
    seen: dict[tuple, fx.Node] = {}
    caches = {x for node in graph.calls(*MUTATING) for x in node.all_input_nodes if x.op == "placeholder"}
    count = 0
    for node in list(graph.fx.nodes):
        if node.op not in ("call_function", "get_attr") or node.target in MUTATING:
            continue
        if not is_size_call(node) and not caches.isdisjoint(node.all_input_nodes):
            if is_view(node):
                caches.add(node)
            continue
        key = (node.op, str(node.target), repr(node.args), repr(sorted(node.kwargs.items(), key=str)))
        if key in seen:
            graph.replace(node, seen[key])
            count += 1
        else:
            seen[key] = node
    graph.clean()
    return count
