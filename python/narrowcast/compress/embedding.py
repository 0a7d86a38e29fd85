"""Embedding tables as int8 rows: a table is gathered, not multiplied, so a scale per row is enough."""

from __future__ import annotations

import torch
from torch import fx

from narrowcast.formats import GroupedWeight, Int8Weight
from narrowcast.graph import Graph

aten = torch.ops.aten
ops = torch.ops.narrowcast

#: Smaller tables are not worth two more gathers.
LEAST_ELEMENTS = 1 << 18


def large_tables(graph: Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.calls(aten.embedding.default)
        if graph.weight(node.args[0]) is not None and graph.weight(node.args[0]).numel() >= LEAST_ELEMENTS
    ]


def gather(
    graph: Graph, node: fx.Node, names: dict[str, fx.Node], weight: Int8Weight | GroupedWeight
) -> None:
    """Replaces ``embedding(table, ids)`` by gathers of the quantised rows and their dequantisation.

    names: ``get_attr`` nodes of the quantised parts ("q" and "scale", or "packed", "scale" and "offset"),
    which the output layer may share.
    """
    ids = node.args[1]
    flat = graph.add_call(aten.reshape.default, (ids, [-1]), like=node)
    rows = {
        part: None
        if attribute is None
        else graph.add_call(aten.index_select.default, (attribute, 0, flat), like=node)
        for part, attribute in names.items()
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
