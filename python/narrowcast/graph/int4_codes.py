"""4-bit codes of a convolution in a plan: packed in the file, unpacked to the int8 that conv2d_int8 reads.

A graph holds them as three calls on a packed weight: dequantize_groups with scale 1, a cast to int8, a view. Run
as they stand they are right but slow, so an executor resolves them once, when it is made.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from narrowcast.formats import pack_int4

from .ir import Graph

aten = torch.ops.aten
ops = torch.ops.narrowcast

#: A scale of 1 that all packed weights of a graph share.
UNIT = "int4.unit"


def add_codes(graph: Graph, name: str, codes: Tensor, before: fx.Node) -> fx.Node:
    """A node with the value of ``codes`` (int8, -8..7, any shape, an even number of them) that keeps 4 bits each."""
    count = codes.numel()
    packed = pack_int4((codes.reshape(1, count) + 8).to(torch.uint8))
    source = graph.add_weight(name, packed, before=before)
    if UNIT not in graph.weights:
        graph.weights[UNIT] = torch.ones(1, 1)
    with graph.fx.inserting_before(before):
        unit = graph.fx.get_attr(UNIT)
    arguments = (source, unit, None, count, 4, torch.float32)
    values = graph.add_call(ops.dequantize_groups.default, arguments, like=before)
    values = graph.add_call(aten.to.dtype, (values, torch.int8), like=before)
    return graph.add_call(aten.view.default, (values, list(codes.shape)), like=before)


def is_codes(node: object) -> bool:
    """Whether a node is what :func:`add_codes` returns."""
    for target in (aten.view.default, aten.to.dtype):
        if not isinstance(node, fx.Node) or node.target is not target:
            return False
        node = node.args[0]
    return (
        isinstance(node, fx.Node)
        and node.target is ops.dequantize_groups.default
        and all(x.op == "get_attr" for x in node.all_input_nodes)
    )


def resolved(nodes: fx.Graph, weights: dict[str, Tensor]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The same graph with every packed weight an int8 one; what was given stays as it is."""
    found = [node.name for node in nodes.nodes if is_codes(node)]
    if not found:
        return nodes, weights
    copy, output = fx.Graph(), None
    mapping: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(nodes, mapping)
    copy.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    weights = dict(weights)
    for old in [node for node in nodes.nodes if node.name in found]:
        name = f"{_packed(old).target}.int8"
        weights[name] = _values(old, weights)
        new = mapping[old]
        with copy.inserting_before(new):
            attribute = copy.get_attr(name)
        attribute.meta = dict(old.meta)
        new.replace_all_uses_with(attribute)
    for node in reversed(list(copy.nodes)):
        if node.op in ("get_attr", "call_function") and not node.users and _is_part(node):
            copy.erase_node(node)
    return copy, weights


def _is_part(node: fx.Node) -> bool:
    targets = (aten.view.default, aten.to.dtype, ops.dequantize_groups.default)
    return node.op == "get_attr" or node.target in targets


def _packed(node: fx.Node) -> fx.Node:
    return node.args[0].args[0].args[0]


@torch.no_grad()
def _values(node: fx.Node, weights: dict[str, Tensor]) -> Tensor:
    value = lambda x: weights[x.target] if x.op == "get_attr" else _values(x, weights)  # noqa: E731
    return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
