"""A CNN as its int8 plan will compute it, in float32: what ranges, equalisation and rounding are judged by.

A convolution that will be int8 reads quantised images, multiplies rounded weights and writes a quantised image;
one that stays in float reads what there is. Products of codes and of their float values are the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer, calls

from .ranges import Ranges, fake_quantised
from .sequential import Batches

ops = torch.ops.narrowcast

#: (weight, bias) of a layer, rounded and back in float32.
Weights = Mapping[fx.Node, tuple[Tensor, Tensor | None]]


class Simulation(Batches):
    """The graph's values for every batch, under quantisation.

    ranges: of every edge that may be quantised. in_float: convolutions that stay in float. weights: what stands
    for a layer's own weight and bias; a layer that is not in it keeps its float weight. quantised: also round
    images (False leaves the weights as the only loss).
    """

    def __init__(
        self, graph: Graph, inputs: list[tuple[Tensor, ...]], ranges: Ranges, weights: Weights,
        in_float: Collection[fx.Node] = (), quantised: bool = True,
    ):  # fmt: skip
        super().__init__(graph, inputs)
        self.ranges, self.weights, self.in_float, self.quantised = ranges, weights, in_float, quantised

    def is_quantised(self, node: Any) -> bool:
        return calls(node, ops.conv2d.default) and node not in self.in_float

    def read(self, source: fx.Node, index: int) -> Tensor:
        """What a quantised convolution reads of an edge."""
        value = self.of(source, index)
        # An image that an int8 layer wrote lies on its grid already.
        if not self.quantised or source not in self.ranges or self.is_quantised(source):
            return value
        return fake_quantised(value, self.ranges[source])

    def run(self, node: fx.Node) -> None:
        if not self.is_quantised(node):
            super().run(node)
            return
        layer = Layer(node)
        own = layer["bias"] if layer["bias"] is None else self.graph.weight(layer["bias"])
        weight, bias = self.weights.get(node, (self.graph.weight(layer["weight"]), own))
        for index, values in enumerate(self.values):
            residual = None if layer["residual"] is None else self.read(layer["residual"], index)
            y = ops.conv2d(
                self.read(layer["x"], index), weight, bias, layer["stride"], layer["padding"],
                layer["dilation"], layer["groups"], layer["activation"], residual,
                layer["post_activation"] or "none",
            )  # fmt: skip
            values[node] = fake_quantised(y, self.ranges[node]) if self.quantised else y

    @torch.no_grad()
    def outputs(self) -> tuple[Tensor, ...]:
        """Runs all of the graph; its outputs, the batches' rows one after the other."""
        for node in self.graph.fx.nodes:
            if node.op == "call_function":
                self.run(node)
            if node.op != "output":
                self.forget(node)
        results = [[self.of(x, i) for x in self.graph.outputs] for i in range(len(self.inputs))]
        return tuple(torch.cat(column) if column[0].dim() else column[0] for column in zip(*results))


def float_outputs(graph: Graph, inputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What the graph itself makes of the batches, rows one after the other."""
    results = [graph.run(*batch) for batch in inputs]
    return tuple(torch.cat(column) if column[0].dim() else column[0] for column in zip(*results))
