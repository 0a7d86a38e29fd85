"""Which channels of a graph belong together: all that must go when one goes.

A channel is made by rows of a convolution or a dense layer, passes depthwise layers, activations, pools and sums,
and is read as columns of other layers. Values that are added share their channels. A space of channels can be cut
when everything it meets is known here; otherwise ``why`` says what stands in the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer, calls, value

aten = torch.ops.aten
ops = torch.ops.narrowcast

#: Calls that keep channels apart and in place, by their first argument.
_SAME = (
    aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.hardswish.default, aten.silu.default,
    aten.gelu.default, aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default, aten.clamp.default,
    aten.leaky_relu.default, aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
    aten.clone.default, aten.contiguous.default, aten.dropout.default,
)  # fmt: skip
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
#: Calls that join two values channel by channel.
_JOINED = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, ops.silu_mul.default, ops.gelu_mul.default)


@dataclass(eq=False)
class Space:
    """size: channels. producers: layers whose rows they are, with the first row. depthwise: layers on the way.
    readers: layers whose columns they are, with the columns of one channel. values: nodes that carry them."""

    size: int
    producers: list[tuple[fx.Node, int]] = field(default_factory=list)
    depthwise: list[fx.Node] = field(default_factory=list)
    readers: list[tuple[fx.Node, int]] = field(default_factory=list)
    slices: list[fx.Node] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)
    why: str = ""

    def absorb(self, other: Space) -> None:
        for name in ("producers", "depthwise", "readers", "slices", "values"):
            getattr(self, name).extend(getattr(other, name))
        self.why = self.why or other.why or ("" if self.size == other.size else "sums of unlike sizes")


class Channels:
    """The spaces of a graph; ``of[node]`` is the one whose channels a value carries."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.of: dict[fx.Node, Space] = {}
        self.columns: dict[fx.Node, int] = {}  #: flattened pixels per channel, where not 1
        for node in graph.fx.nodes:
            if node.op == "placeholder":
                self._new(node, 0, "it is an input of the model")
            elif node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                for x in node.all_input_nodes:
                    self._fix(x, "it is an output of the model")

    @property
    def spaces(self) -> list[Space]:
        """Every space once, in the order of the graph."""
        return list(dict.fromkeys(self.of.values()))

    # --- building -----------------------------------------------------------------------------------

    def _new(self, node: fx.Node, size: int, why: str = "") -> Space:
        space = Space(size, values=[node], why=why)
        self.of[node] = space
        return space

    def _fix(self, node: fx.Node, why: str) -> None:
        if node in self.of and not self.of[node].why:
            self.of[node].why = why

    def _carry(self, node: fx.Node, source: fx.Node) -> None:
        space = self.of[source]
        space.values.append(node)
        self.of[node] = space
        if source in self.columns:
            self.columns[node] = self.columns[source]

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        first, second = self.of[a], self.of[b]
        if self.columns.get(a, 1) != self.columns.get(b, 1):
            first.why = "sums of unlike sizes"
        if first is second:
            return
        first.absorb(second)
        for node in second.values:
            self.of[node] = first

    def _visit(self, node: fx.Node) -> None:
        if calls(node, ops.conv2d.default, ops.linear.default):
            self._layer(node)
        elif calls(node, *_SAME, *_PADS) and node.args[0] in self.of:
            self._carry(node, node.args[0])
            if calls(node, *_PADS) and len(node.args[1]) > 4:
                self._fix(node, "it is padded")
        elif calls(node, *_JOINED) and all(x in self.of for x in node.args[:2]) and self._alike(node):
            self._carry(node, node.args[0])
            self._join(node.args[0], node.args[1])
        elif calls(node, aten.mean.dim) and self._is_global_mean(node):
            self._carry(node, node.args[0])
        elif calls(node, aten.flatten.using_ints) and self._is_flatten(node):
            self._carry(node, node.args[0])
            before, after = value(node.args[0]), value(node)
            self.columns[node] = after.shape[1] // before.shape[1]
        elif calls(node, aten.slice.Tensor) and self._is_window(node):
            window = self._new(node, node.args[3] - node.args[2])
            window.producers, window.slices = [(node.args[0], node.args[2])], [node]
        else:
            for x in node.all_input_nodes:
                self._fix(x, f"{getattr(node.target, '__name__', node.target)} reads it")
            self._new(node, 0, "it is not made by a layer")

    def _layer(self, node: fx.Node) -> None:
        layer, weight = Layer(node), self.graph.weight(Layer(node)["weight"])
        source, residual = layer["x"], layer["residual"]
        if weight is None or source not in self.of:
            self._new(node, 0, "its weight is computed")
            return
        groups = layer["groups"] or 1 if calls(node, ops.conv2d.default) else 1
        if groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1:
            self._carry(node, source)
            self.of[node].depthwise.append(node)
        else:
            self._new(node, weight.shape[0]).producers.append((node, 0))
            self.of[source].readers.append((node, self.columns.get(source, 1)))
            if groups > 1:
                self._fix(source, "a layer in groups reads it")
                self._fix(node, "a layer in groups makes it")
        users = layer["weight"].users
        if len(users) > 1 or (layer["bias"] is not None and len(layer["bias"].users) > 1):
            self._fix(source, "its reader shares a weight")
            self._fix(node, "its layer shares a weight")
        if isinstance(residual, fx.Node):
            self._join(node, residual) if residual in self.of else self._fix(node, "it is added to")

    # --- what a call does ----------------------------------------------------------------------------

    def _alike(self, node: fx.Node) -> bool:
        a, b = (value(x) for x in node.args[:2])
        return a is not None and b is not None and [str(s) for s in a.shape] == [str(s) for s in b.shape]

    def _is_global_mean(self, node: fx.Node) -> bool:
        x = value(node.args[0])
        return (
            node.args[0] in self.of
            and x is not None
            and x.dim() == 4
            and sorted(a % 4 for a in node.args[1]) == [2, 3]
        )

    def _is_flatten(self, node: fx.Node) -> bool:
        x, y = value(node.args[0]), value(node)
        known = node.args[0] in self.of and x is not None and y is not None
        first = node.args[1] if len(node.args) > 1 else 0
        return known and first == 1 and y.dim() == 2 and all(isinstance(t.shape[1], int) for t in (x, y))

    def _is_window(self, node: fx.Node) -> bool:
        """A slice of features of a dense layer that is only read in slices, as merged layers are."""
        source = node.args[0]
        whole = (
            calls(source, ops.linear.default)
            and source in self.of
            and len(node.args) == 4
            and node.args[1] == -1
            and Layer(source)["activation"] in (None, "none")
            and Layer(source)["residual"] is None
        )
        if not whole or not all(calls(u, aten.slice.Tensor) and len(u.args) == 4 for u in source.users):
            return False
        size = self.graph.weight(Layer(source)["weight"]).shape[0]
        bounds = sorted((u.args[2], min(u.args[3], size)) for u in source.users)
        ends = [0, *(b for _, b in bounds)]
        if any(u.args[1] != -1 for u in source.users) or ends[-1] != size or node.args[3] > size:
            return False
        if any(a != end for (a, _), end in zip(bounds, ends)):
            return False
        self._fix(source, "it is read in slices, which are spaces of their own")
        return True
