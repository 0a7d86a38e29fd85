"""Attention, as one ATen call or written out -> narrowcast.attention; repeated key and value heads undone."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import fx

from ..ir import Graph
from .match import argument, aten, calls, ops, scalar, uncast, value


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


def fuse_written_attention(graph: Graph) -> int:
    """softmax(scale * q k^T + mask) v, as products and a softmax."""
    count = 0
    for node in graph.calls(aten.matmul.default):
        matched = _written(graph, node)
        if matched is None:
            continue
        q, keys, v, scale, masks = matched
        keys = graph.add_call(aten.transpose.int, (keys, 2, 3), like=node)
        keys.meta["val"] = value(keys.args[0]).transpose(2, 3)
        kwargs: dict[str, Any] = {"scale": scale}
        if masks:
            kwargs["bias"] = functools.reduce(
                lambda a, b: graph.add_call(aten.add.Tensor, (a, b), like=node), reversed(masks)
            )
        graph.replace(node, graph.add_call(ops.attention.default, (q, keys, v), kwargs, like=node))
        count += 1
    graph.clean()
    return count


_PRODUCTS = (aten.matmul.default, aten.mul.Tensor, aten.div.Tensor)


def _written(graph: Graph, node: fx.Node) -> tuple | None:
    """(q, k transposed, v, scale, masks) of a product softmax(...) v."""
    weights, v = uncast(node.args[0]), node.args[1]
    if not calls(weights, aten.softmax.int, aten._softmax.default) or value(v) is None or value(v).dim() != 4:
        return None
    scores, masks, scale = uncast(weights.args[0]), [], 1.0
    if weights.args[1] not in (-1, 3):
        return None
    while calls(scores, aten.add.Tensor) and not scores.kwargs:
        scores, mask = sorted(scores.args, key=lambda x: not calls(x, *_PRODUCTS, aten.add.Tensor))
        if value(mask) is None or not value(mask).dtype.is_floating_point or value(mask).dim() > 4:
            return None
        masks.append(mask)
    if calls(scores, *_PRODUCTS[1:]):
        number = scalar(graph, scores.args[1])
        if not number:
            return None
        scale = number if scores.target is aten.mul.Tensor else 1 / number
        scores = scores.args[0]
    if not calls(scores, aten.matmul.default) or any(value(x) is None for x in scores.args):
        return None
    q, keys = scores.args
    lead = [str(size) for size in value(v).shape[:2]]
    if any(value(x).dim() != 4 or [str(s) for s in value(x).shape[:2]] != lead for x in (q, keys)):
        return None
    if len({value(x).dtype for x in (q, keys, v, node)}) != 1:
        return None
    return q, keys, v, scale, masks


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
