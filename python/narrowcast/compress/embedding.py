"""Embedding tables as int8 rows: a table is gathered, not multiplied, so a scale per row is enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from narrowcast.formats import GroupedWeight, Int8Weight
from narrowcast.graph import Graph

aten = torch.ops.aten
ops = torch.ops.narrowcast

Quantised = Int8Weight | GroupedWeight
Parts = dict[str, fx.Node | None]

#: Smaller tables are not worth two more gathers.
LEAST_ELEMENTS = 1 << 18


def large_tables(graph: Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.calls(aten.embedding.default)
        if graph.weight(node.args[0]) is not None and graph.weight(node.args[0]).numel() >= LEAST_ELEMENTS
    ]


def quantize_tables(
    graph: Graph,
    shared: dict[str, tuple[Parts, Quantised]],
    make: Callable[[fx.Node, str], tuple[Parts, Quantised] | None],
) -> list[tuple[str, Tensor, Quantised]]:
    """Replaces every large table; returns (name, float table, quantised table) of each.

    shared: weight name -> what the output layer made of it, for tied tables. make(node, name): the parts of
    any other table, placed before ``node``, or None to leave it in float.
    """
    replaced = []
    for node in large_tables(graph):
        target = node.args[0].target
        name, table = target.removesuffix(".weight"), graph.weights[target]
        if target in shared:
            parts, quantised = shared[target]
            # The gather runs before the output layer: its weights must be there already.
            first = next(iter(graph.fx.nodes))
            for part in parts.values():
                if part is not None:
                    first.prepend(part)
        else:
            made = make(node, name)
            if made is None:
                continue
            parts, quantised = made
        gather(graph, node, parts, quantised)
        replaced.append((name, table, quantised))
    return replaced


def gather(graph: Graph, node: fx.Node, parts: Parts, weight: Quantised) -> None:
    """Replaces ``embedding(table, ids)`` by gathers of the quantised rows and their dequantisation.

    parts: ``get_attr`` nodes of the quantised parts ("q" and "scale", or "packed", "scale" and "offset"),
    which the output layer may share.
    """
    ids = node.args[1]
    flat = graph.add_call(aten.reshape.default, (ids, [-1]), like=node)
    rows = {
        part: None
        if attribute is None
        else graph.add_call(aten.index_select.default, (attribute, 0, flat), like=node)
        for part, attribute in parts.items()
    }
    if isinstance(weight, Int8Weight):
        values = graph.add_call(ops.dequantize_int8.default, (rows["q"], rows["scale"]), like=node)
    else:
        arguments = (rows["packed"], rows["scale"], rows["offset"], weight.group_size, weight.bits)
        values = graph.add_call(ops.dequantize_groups.default, arguments, like=node)
    rank = node.args[1].meta["val"].dim() if "val" in node.args[1].meta else 2
    sizes = [graph.add_call(aten.sym_size.int, (ids, d), like=node) for d in range(rank)]
    shaped = graph.add_call(aten.reshape.default, (values, [*sizes, weight.shape[1]]), like=node)
    graph.replace(node, shaped)
