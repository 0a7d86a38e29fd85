"""Drops calls that return their input: casts to the same dtype, full slices, copies, x * 1, x + 0."""

from __future__ import annotations

from ..ir import Graph
from .match import argument, aten, same_shape, value

_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
}
_LAYOUT = {aten.contiguous.default, aten.clone.default}
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_WHOLE = 2**63 - 1


def simplify(graph: Graph) -> int:
    removed = 0
    for node in graph.calls():
        x = node.args[0] if node.args else None
        before, after = value(x), value(node)
        if before is None or after is None:
            continue
        if node.target in _CASTS:
            redundant = before.dtype == after.dtype
        elif node.target in _LAYOUT:  # layout is decided by the executor, never by the source
            redundant = x.op != "placeholder"  # a copy of a cache must not see later writes
        elif node.target is aten.slice.Tensor:
            start, end = argument(node, 2, "start") or 0, argument(node, 3, "end", _WHOLE)
            redundant = start == 0 and end == _WHOLE and argument(node, 4, "step", 1) == 1
        elif node.target in (aten.expand.default, aten.view.default, aten.reshape.default):
            redundant = same_shape(x, node)
        elif node.target is aten.mul.Tensor:
            redundant = node.args[1] == 1 and before.dtype == after.dtype
        elif node.target is aten.add.Tensor:
            redundant = node.args[1] == 0 and before.dtype == after.dtype
        else:
            continue
        if redundant:
            graph.replace(node, x)
            removed += 1
    for node in graph.calls(*_VIEWS):
        node.target = aten.reshape.default  # what it views may have lost the copy that made it contiguous
    return removed
