"""Dense layers of one input -> one layer and views of its output: query, key and value; gate and up."""

from __future__ import annotations

import torch

from narrowcast.formats import GroupedWeight, Int8Weight

from ..ir import Graph
from .fuse_activation import activation_name
from .match import Layer, aten, only_user, ops, value


def merge_linears(graph: Graph) -> int:
    count = 0
    for x in list(graph.fx.nodes):
        layers = [Layer(n) for n in x.users if n.op == "call_function" and n.target is ops.linear.default]
        layers = [layer for layer in layers if layer["x"] is x and _is_plain(layer)]
        for group in _compatible(graph, layers):
            _merge(graph, group)
            count += 1
    graph.clean()
    return count


def _is_plain(layer: Layer) -> bool:
    # One epilogue serves all rows of a layer: what has one, or will get one, stays by itself.
    following = only_user(layer.node)
    if following is not None and activation_name(following) is not None:
        return False
    return layer["activation"] == "none" and layer["residual"] is None and layer["post_activation"] == "none"


def _compatible(graph: Graph, layers: list[Layer]) -> list[list[Layer]]:
    """Groups of at least two whose weights (and native forms) can lie under one another."""
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        name = layer["weight"].target
        key = (graph.weights[name].dtype, layer["bias"] is None, _form(graph.native.get(name)))
        groups.setdefault(key, []).append(layer)
    # A large head beside a small layer would only move bytes: merge within a factor of 16.
    result = []
    for members in groups.values():
        rows = [graph.weight(m["weight"]).shape[0] for m in members]
        if len(members) > 1 and max(rows) <= 16 * min(rows):
            result.append(members)
    return result


def _form(native: GroupedWeight | Int8Weight | None) -> tuple:
    if not isinstance(native, GroupedWeight):
        return (type(native),)
    columns = None if native.columns is None else tuple(native.columns.tolist())
    return native.bits, native.group_size, native.offset is None, columns


def _merge(graph: Graph, layers: list[Layer]) -> None:
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    layers = sorted(layers, key=lambda layer: order[layer.node])
    first = layers[0].node
    names = [layer["weight"].target for layer in layers]
    weights = [graph.weights[name] for name in names]
    joined = _joined_name(names)
    weight = graph.add_weight(joined, torch.cat(weights), before=first)
    if all(name in graph.native for name in names):
        parts = [graph.native[name] for name in names]
        graph.native[weight.target] = type(parts[0]).concatenate(parts)
    bias = None
    if layers[0]["bias"] is not None:
        biases = torch.cat([graph.weight(layer["bias"]) for layer in layers])
        bias = graph.add_weight(joined.removesuffix("weight") + "bias", biases, before=first)
    merged = graph.add_call(ops.linear.default, (layers[0]["x"], weight, bias), like=first)
    shape = value(first)
    if shape is not None:
        rows = sum(w.shape[0] for w in weights)
        merged.meta["val"] = shape.new_empty((*shape.shape[:-1], rows))
    start, parts = 0, []
    for w in weights:
        arguments = (merged, -1, start, start + w.shape[0])
        parts.append(graph.add_call(aten.slice.Tensor, arguments, like=first))
        start += w.shape[0]
    for layer, part in zip(layers, parts):
        graph.replace(layer.node, part)


def _joined_name(names: list[str]) -> str:
    """a.q_proj.weight, a.k_proj.weight -> a.q_proj+k_proj.weight"""
    parts = [name.split(".") for name in names]
    last = parts[0][-1]
    common = parts[0][:-2]
    if all(len(p) >= 2 and p[:-2] == common and p[-1] == last for p in parts):
        return ".".join([*common, "+".join(p[-2] for p in parts), last])
    return "+".join(names)
