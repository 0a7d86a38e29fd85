"""Outputs of a graph with one layer changed, without running again what lies before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.ir import MUTATING, last_uses

Change = Callable[[tuple, dict], Any]


class Replay:
    """Runs ``graph`` once on ``inputs``, keeps every value, and from then on only what a change reaches.

    Memory: all intermediate results for these inputs.
    """

    def __init__(self, graph: Graph, inputs: tuple[Tensor, ...]):
        self.graph = graph
        inputs = tuple(x.clone() for x in inputs)  # caches are written to
        self._values: dict[fx.Node, Any] = dict(zip(graph.inputs, inputs))
        self.outputs = graph.run(
            *inputs, observe=lambda n, args, kwargs, result: self._values.update({n: result})
        )
        self._last = last_uses(graph.fx)

    @torch.no_grad()
    def run(self, changes: Mapping[fx.Node, Change]) -> tuple:
        """The outputs when the calls in ``changes`` return ``change(args, kwargs)`` of their arguments."""
        changed: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            if node in changed:
                return changed[node]
            return self.graph.weights[node.target] if node.op == "get_attr" else self._values[node]

        for node in self.graph.fx.nodes:
            if node.op == "output":
                return tuple(fx.map_arg(node.args[0], value))
            if node.op != "call_function":
                continue
            change = changes.get(node)
            if change is not None or any(x in changed for x in node.all_input_nodes):
                if node.target in MUTATING:
                    for argument, given in zip(node.target._schema.arguments, node.args):
                        writes = argument.alias_info is not None and argument.alias_info.is_write
                        # Only what it writes is read again, by calls that come after it.
                        if writes and isinstance(given, fx.Node) and given not in changed:
                            changed[given] = self._values[given].clone()
                args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
                changed[node] = node.target(*args, **kwargs) if change is None else change(args, kwargs)
            for dead in self._last.get(node, ()):
                changed.pop(dead, None)
        raise AssertionError("a graph ends with its output node")
