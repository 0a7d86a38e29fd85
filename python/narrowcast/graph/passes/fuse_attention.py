"""aten.scaled_dot_product_attention -> narrowcast.attention, repeated key and value heads undone."""

from __future__ import annotations

import math

import torch
from torch import fx

from ..ir import Graph
from .match import argument, aten, calls, ops, value


def fuse_attention(graph: Graph) -> int:
    count = 0
    for node in graph.calls(aten.scaled_dot_product_attention.default):
        q, k, v = node.args[:3]
        if value(q) is None or value(q).dim() != 4 or argument(node, 4, "dropout_p", 0.0):
            continue
        mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
        if causal and str(value(q).shape[2]) != str(value(k).shape[2]):
            continue  # torch aligns such a mask to the top left, narrowcast to the bottom right
        if mask is not None and value(mask).dtype == torch.bool:
            mask = _additive(graph, mask, node)
        kwargs = {"bias": mask, "scale": node.kwargs.get("scale"), "causal": causal}
        kwargs = {name: x for name, x in kwargs.items() if x is not None and x is not False}
        heads = (q, _unrepeated(k), _unrepeated(v))
        graph.replace(node, graph.add_call(ops.attention.default, heads, kwargs, like=node))
        count += 1
    graph.clean()
    return count


def _additive(graph: Graph, mask: fx.Node, like: fx.Node) -> fx.Node:
    """0 where a boolean mask allows, -inf elsewhere; one node per mask, shared by the layers."""
    for user in mask.users:
        if calls(user, aten.where.self):
            return user
    following = mask.next
    zero = graph.add_weight("attention_mask.allowed", torch.tensor(0.0), before=following)
    low = graph.add_weight("attention_mask.hidden", torch.tensor(-math.inf), before=following)
    node = graph.add_call(aten.where.self, (mask, zero, low), like=following)
    node.meta = {"val": torch.empty_like(value(mask), dtype=torch.float32), "source": like.meta["source"]}
    return node


def _unrepeated(node: fx.Node) -> fx.Node:
    """k or v before reshape(expand(unsqueeze(., 2))), the usual way to repeat heads."""
    if not calls(node, aten.reshape.default, aten.view.default):
        return node
    expanded = node.args[0]
    if calls(expanded, aten.clone.default):
        expanded = expanded.args[0]
    if not calls(expanded, aten.expand.default) or not calls(expanded.args[0], aten.unsqueeze.default):
        return node
    x, axis = expanded.args[0].args
    return x if axis == 2 and value(x) is not None and value(x).dim() == 4 else node
