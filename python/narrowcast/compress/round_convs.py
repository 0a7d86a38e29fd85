"""Convolutions rounded one after the other, each for what the quantised layers before it make of the pictures.

The float graph runs beside the quantised one and its outputs are the aim, so a layer makes up, as far as it can,
for what those before it lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer

from .adaround import RoundedConv, Rows, places, round_conv, rows_wanted, unfold
from .ranges import Ranges
from .sequential import Batches
from .simulation import Simulation
from .transformer import layer_name

ops = torch.ops.narrowcast


@torch.no_grad()
def round_convs(
    graph: Graph,
    inputs: list[tuple[Tensor, ...]],
    ranges: Ranges,
    bits: Mapping[fx.Node, int],
    in_float: Collection[fx.Node] = (),
    learn: Callable[[fx.Node], bool] = lambda node: False,
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[fx.Node, RoundedConv]:
    """Rounds the weight of every convolution of ``bits``; changes nothing.

    ranges: of every image that a quantised convolution reads or writes. learn(node): try AdaRound there.
    """
    generator = torch.Generator().manual_seed(0)
    rounded: dict[fx.Node, RoundedConv] = {}
    weights: dict[fx.Node, tuple[Tensor, Tensor | None]] = {}
    ours, theirs = Simulation(graph, inputs, ranges, weights, in_float), Batches(graph, inputs)
    for node in graph.fx.nodes:
        if len(rounded) == len(bits) or node.op == "output":
            break
        if node.op == "call_function":
            theirs.run(node)
            if node in bits:
                rows = _rows(node, ours, theirs, generator)
                layer = Layer(node)
                bias = None if layer["bias"] is None else graph.weight(layer["bias"])
                weight = graph.weight(layer["weight"])
                made = round_conv(layer, weight, bias, rows, bits[node], learn(node), generator)
                made.name = layer_name(layer)
                rounded[node] = made
                weights[node] = (made.dequantize(), made.bias)
                if progress is not None:
                    progress("rounding", len(rounded), len(bits))
            ours.run(node)
        ours.forget(node)
        theirs.forget(node)
    return rounded


@torch.no_grad()
def round_alone(
    graph: Graph,
    inputs: list[tuple[Tensor, ...]],
    wanted: Mapping[fx.Node, Collection[tuple[int, int]]],
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[fx.Node, dict[tuple[int, int], RoundedConv]]:
    """Every convolution of ``wanted`` rounded to each (bits, size of its groups, 0 for rows), for float inputs.

    Nothing is made up for other layers, so that any mix of these can be put together. Changes nothing.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[fx.Node, dict[tuple[int, int], RoundedConv]] = {}
    ours = Simulation(graph, inputs, {}, {}, wanted)
    for node in graph.fx.nodes:
        if len(made) == len(wanted) or node.op == "output":
            break
        if node.op == "call_function":
            ours.run(node)
            if node in wanted:
                rows, layer = _rows(node, ours, ours, generator), Layer(node)
                bias = None if layer["bias"] is None else graph.weight(layer["bias"])
                weight = graph.weight(layer["weight"])
                made[node] = {
                    (bits, size): round_conv(layer, weight, bias, rows, bits, False, generator, size)
                    for bits, size in wanted[node]
                }
                if progress is not None:
                    progress("rounding", len(made), len(wanted))
        ours.forget(node)
    return made


def _rows(node: fx.Node, ours: Simulation, theirs: Batches, generator: torch.Generator) -> Rows | None:
    """Pixels of all pictures alike; rows with a number that is not finite are left out."""
    layer = Layer(node)
    weight = ours.graph.weight(layer["weight"]).float()
    groups, kernel = layer["groups"] or 1, (weight.shape[2], weight.shape[3])
    total = sum(values[node].shape[0] for values in theirs.values)
    wanted = rows_wanted(weight, groups)
    parts: list[list[Tensor]] = [[], [], [], []]
    for index, values in enumerate(theirs.values):
        shape = values[node].shape
        at = places(shape, -(-wanted * shape[0] // total), generator)
        x = unfold(ours.read(layer["x"], index), layer, at, kernel)
        aim = unfold(theirs.of(layer["x"], index), layer, at, kernel)
        bias = 0 if layer["bias"] is None else ours.graph.weight(layer["bias"]).float()
        aim = aim @ weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
        aim = aim + (bias.reshape(groups, 1, -1) if isinstance(bias, Tensor) else 0)
        found = [x, aim]
        if layer["residual"] is not None:
            for values_of in (ours.read, theirs.of):
                r = values_of(layer["residual"], index)[at[0], :, at[1], at[2]].float()
                found.append(r.reshape(r.shape[0], groups, -1).transpose(0, 1))
            if (layer["activation"] or "none") == "none":
                # Nothing stands between product and residual: the product can make up for the residual as well.
                found[1] = found[1] + (found[3] - found[2])
                found[3] = found[2]
        for part, t in zip(parts, found):
            part.append(t)
    joined = [torch.cat(p, dim=1) if p else None for p in parts]
    finite = torch.stack([t.isfinite().all(-1).all(0) for t in joined if t is not None]).all(0)
    if not finite.any():
        return None
    # Rows of one picture lie together and the first ones judge: a picture is seen or judges, hardly ever both.
    return Rows(*(None if t is None else t[:, finite].contiguous() for t in joined))
