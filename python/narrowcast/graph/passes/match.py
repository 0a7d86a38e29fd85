"""Small questions that every pass asks of a node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ir import Graph

aten = torch.ops.aten
ops = torch.ops.narrowcast


def calls(node: Any, *targets) -> bool:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def scalar(graph: Graph, x: Any) -> float | None:
    """The number that an argument is: a literal, or a weight with a single element."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    tensor = graph.weight(x)
    return float(tensor) if tensor is not None and tensor.numel() == 1 and tensor.dim() == 0 else None


#: Calls that change the dtype of a tensor and nothing else.
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.device, aten.to.dtype_layout)


def uncast(node: fx.Node) -> fx.Node:
    """What ``node`` is a cast of, or ``node``."""
    return node.args[0] if calls(node, *CASTS) else node


def is_view(node: fx.Node) -> bool:
    """Whether the result may share the memory of an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that uses ``node``, when there is exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def value(node: Any) -> Tensor | None:
    """The fake tensor that export recorded for a node."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, Tensor) else None


def same_shape(a: Any, b: Any) -> bool:
    """Whether two nodes have the same shape for every size of the symbols."""
    a, b = value(a), value(b)
    if a is None or b is None or a.dim() != b.dim():
        return False
    # Symbols compare by their expression: a guess at their value would specialise the graph.
    return all(str(x) == str(y) for x, y in zip(a.shape, b.shape))


def commuted(node: fx.Node) -> tuple[tuple[Any, Any], ...]:
    """Both orders of a binary call's operands."""
    a, b = node.args[:2]
    return (a, b), (b, a)


_DEFAULTS = {"activation": "none", "post_activation": "none"}


class Layer:
    """A call of ``narrowcast.linear`` or ``narrowcast.conv2d``, its arguments by name."""

    _linear = ("x", "weight", "bias", "activation", "residual", "out_dtype", "post_activation")
    _conv2d = (
        "x", "weight", "bias", "stride", "padding", "dilation", "groups", "activation", "residual",
        "post_activation",
    )  # fmt: skip

    def __init__(self, node: fx.Node):
        self.node = node
        self.names = self._linear if calls(node, ops.linear.default) else self._conv2d
        given = dict(zip(self.names, node.args)) | dict(node.kwargs)
        self.values = {name: given.get(name, _DEFAULTS.get(name)) for name in self.names}

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def set(self, **changes) -> None:
        """Rewrites the call with some arguments changed."""
        self.values |= changes
        kwargs = {n: v for n, v in self.values.items() if n != "x" and v not in (None, "none")}
        positional = 7 if self.names is self._conv2d else 3
        self.node.args = tuple(self.values[name] for name in self.names[:positional])
        self.node.kwargs = {n: v for n, v in kwargs.items() if n not in self.names[:positional]}


LAYERS = (ops.linear.default, ops.conv2d.default)
