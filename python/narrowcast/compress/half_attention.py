"""Attention in bfloat16 where it lies between quantised layers.

Queries, keys, values, a decoder's float caches and what attention returns take half the bytes, and their
products run in the 16-bit instructions that CPUs and GPUs have for them. The layer before writes bfloat16, the
layer behind quantises it: rounding to 8 bits of mantissa is small beside the int8 rounding that follows.
"""

from __future__ import annotations

import torch
from torch import fx

from narrowcast.graph import Graph
from narrowcast.graph.ir import is_size_call
from narrowcast.graph.passes.match import argument, calls

aten = torch.ops.aten
ops = torch.ops.narrowcast

_ATTENTION = (ops.attention.default, ops.attention_decode.default)
_LAYERS = (ops.linear_dynamic_int8.default, ops.linear_grouped.default)
#: Calls that move elements, or turn them (rope), and keep their dtype.
_MOVES = (
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.unsqueeze.default, aten.clone.default, aten.contiguous.default, ops.rope.default,
)  # fmt: skip


def narrow_attention(graph: Graph, dtype: torch.dtype = torch.bfloat16) -> int:
    """In place; returns how many attentions now run in ``dtype``.

    Taken are those whose queries, keys and values come from quantised layers (or float caches) and go nowhere
    else, and whose result only feeds quantised layers: all others stay as they are.
    """
    count = 0
    for node in graph.calls(*_ATTENTION):
        before = _before(node)
        behind = _behind(node) if before is not None else None
        if before is None or behind is None:
            continue
        for layer in before:
            if calls(layer, *_LAYERS):
                _set(layer, "out_dtype", dtype)
        readers = {x for x in behind if calls(x, *_LAYERS)}
        for layer in readers:
            if _get(layer, "out_dtype") is None:
                _set(layer, "out_dtype", torch.float32)
        for changed in before | {node} | behind - readers:
            _retype(changed, dtype)
        count += 1
    return count


def _before(node: fx.Node) -> set[fx.Node] | None:
    """The nodes that carry queries, keys and values to an attention; None where one of them has another use."""
    found: set[fx.Node] = set()
    appends = [u for c in node.args[1:3] for u in c.users if calls(u, ops.kv_append.default)]
    waiting = [node.args[0], *node.args[1:3], *(x for a in appends for x in a.args[2:4])]
    while waiting:
        x = waiting.pop()
        if x in found:
            continue
        is_cache = x.op == "placeholder" and bool(appends) and _dtype(x) is torch.float32
        if not is_cache and not calls(x, *_MOVES, *_LAYERS):
            return None
        found.add(x)
        if calls(x, *_MOVES):
            waiting.append(x.args[0])
    allowed = found | {node, *appends}
    return found if all(u in allowed or is_size_call(u) for x in found for u in x.users) else None


def _behind(node: fx.Node) -> set[fx.Node] | None:
    """The nodes that carry the result, and the layers that read it; None where anything else does."""
    found: set[fx.Node] = set()
    waiting = list(node.users)
    while waiting:
        x = waiting.pop()
        if calls(x, *_LAYERS):
            found.add(x)
        elif calls(x, *_MOVES):
            found.add(x)
            waiting.extend(x.users)
        elif not is_size_call(x):
            return None
    # The result may be a layer's input, but not what it adds to its output.
    carriers = {node} | {x for x in found if calls(x, *_MOVES)}
    return None if any(_get(x, "residual") in carriers for x in found - carriers) else found


def _place(node: fx.Node, name: str) -> int:
    return [a.name for a in node.target._schema.arguments].index(name)


def _get(node: fx.Node, name: str):
    return argument(node, _place(node, name), name)


def _set(node: fx.Node, name: str, value: object) -> None:
    at = _place(node, name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return node.meta.get("dtype") if value is None else value.dtype


def _retype(node: fx.Node, dtype: torch.dtype) -> None:
    value = node.meta.get("val")
    if value is not None:
        node.meta["val"] = value.new_empty(value.shape, dtype=dtype)
    elif node.op == "placeholder":  # read from a plan
        node.meta["dtype"] = dtype
