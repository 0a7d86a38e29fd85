"""x * cos + rotate_half(x) * sin with tables from positions and constant frequencies -> rope."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..ir import Graph
from .match import aten, calls, commuted, ops, value


def fuse_rope(graph: Graph, positions: int = 8192) -> int:
    """``positions``: rows of the constant tables, the largest position a model may be run at."""
    tables: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    expanded: dict[tuple[fx.Node, str], fx.Node] = {}
    count = 0
    for node in graph.calls(aten.add.Tensor):
        matched = _match(node)
        if matched is None:
            continue
        x, cos, sin = matched
        angles = _angles(graph, cos, sin)
        if angles is None:
            continue
        frequencies, scale, where = angles
        if frequencies.numel() * 2 > value(x).shape[-1]:
            continue
        if where not in tables:
            table = torch.arange(positions).double()[:, None] * frequencies.double()
            first = next(iter(graph.fx.nodes))
            tables[where] = tuple(
                graph.add_weight(f"rope.{name}", (f(table) * scale).float().contiguous(), before=first)
                for name, f in (("cos", torch.cos), ("sin", torch.sin))
            )
        cosines, sines = tables[where]
        if str(value(where).shape[0]) != str(value(x).shape[0]):  # one row of positions for the whole batch
            key = (where, str(value(x).shape[0]))
            if key not in expanded:
                batch = graph.add_call(aten.sym_size.int, (x, 0), like=node)
                expanded[key] = graph.add_call(aten.expand.default, (where, [batch, -1]), like=node)
            where = expanded[key]
        graph.replace(node, graph.add_call(ops.rope.default, (x, cosines, sines, where), like=node))
        count += 1
    graph.clean()
    return count


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) when ``node`` is x * unsqueeze(cos) + cat(-x[half:], x[:half]) * unsqueeze(sin)."""
    for straight, turned in commuted(node):
        if not calls(straight, aten.mul.Tensor) or not calls(turned, aten.mul.Tensor):
            continue
        for x, cos in commuted(straight):
            for rotated, sin in commuted(turned):
                if not calls(rotated, aten.cat.default) or not _is_rotation(rotated, x):
                    continue
                if calls(cos, aten.unsqueeze.default) and calls(sin, aten.unsqueeze.default):
                    return x, cos.args[0], sin.args[0]
    return None


def _is_rotation(node: fx.Node, x: fx.Node) -> bool:
    parts = node.args[0]
    if len(parts) != 2 or not calls(parts[0], aten.neg.default):
        return False
    second, first = parts[0].args[0], parts[1]
    if not calls(first, aten.slice.Tensor) or not calls(second, aten.slice.Tensor):
        return False
    half = value(x).shape[-1] // 2
    return first.args[:4] == (x, 3, 0, half) and second.args[:3] == (x, 3, half)


def _angles(graph: Graph, cos: fx.Node, sin: fx.Node) -> tuple[Tensor, float, fx.Node] | None:
    """(frequencies [R / 2], attention scaling, positions) when cos and sin are of positions * frequencies."""
    scales = []
    sources = []
    for node, function in ((cos, aten.cos.default), (sin, aten.sin.default)):
        scale = 1.0
        while calls(node, aten.mul.Tensor, aten.to.dtype) and not isinstance(node.args[1], fx.Node):
            if node.target is aten.mul.Tensor:
                scale *= node.args[1]
            node = node.args[0]
        if not calls(node, function):
            return None
        scales.append(scale)
        sources.append(node.args[0])
    if sources[0] is not sources[1] or scales[0] != scales[1]:
        return None
    doubled = sources[0]
    if not calls(doubled, aten.cat.default) or doubled.args[0][0] is not doubled.args[0][1]:
        return None
    angles = doubled.args[0][0]
    if calls(angles, aten.transpose.int):
        angles = angles.args[0]
    if not calls(angles, aten.mul.Tensor, aten.matmul.default, aten.bmm.default):
        return None
    for a, b in commuted(angles):
        frequencies, where = _constant(graph, a), _positions(b)
        if frequencies is not None and where is not None:
            return frequencies.flatten(), scales[0], where
    return None


_THROUGH = (
    aten.unsqueeze.default,
    aten.expand.default,
    aten.to.dtype,
    aten.to.device,
    aten.slice.Tensor,
    aten.view.default,
    aten.reshape.default,
)


def _constant(graph: Graph, node: fx.Node) -> Tensor | None:
    while calls(node, *_THROUGH):
        node = node.args[0]
    return graph.weight(node)


def _positions(node: fx.Node) -> fx.Node | None:
    """The integer tensor [B, S] under casts and unsqueezes."""
    while calls(node, *_THROUGH):
        found = value(node)
        if found is not None and found.dim() == 2 and not found.dtype.is_floating_point:
            return node
        node = node.args[0]
    found = value(node)
    return node if found is not None and found.dim() == 2 and not found.dtype.is_floating_point else None
