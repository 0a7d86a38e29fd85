"""Cross-layer equalisation: channels between two convolutions scaled so that both share the strain of rounding.

y = act(W1 x + b1), z = W2 y is the same for W1 / s, b1 / s and W2 * s where act(v / s) * s = act(v): for none and
relu always. relu6 clips at 6 s after scaling; a channel may take part whose values stay, by a margin, below 6 and
below 6 s on the calibration pictures, the others keep s = 1. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer, calls, only_user

from .ranges import Ranges, observe_edges, output_error
from .simulation import Simulation, float_outputs
from .weights import nearest_rows

ops = torch.ops.narrowcast

#: Rounds over all pairs: a depthwise layer stands in two of them.
ROUNDS = 20
#: How far below 6 the largest value of a channel must stay for relu6 to count as inactive.
MARGIN = 1.25
#: A scale stays between its inverse and this.
MOST = 1e3


def pairs(graph: Graph) -> list[tuple[fx.Node, fx.Node]]:
    """(layer, the layer that alone reads its output), with an activation that scales."""
    found = []
    for first in graph.calls(ops.conv2d.default):
        second, layer = only_user(first), Layer(first)
        if second is None or not calls(second, ops.conv2d.default) or Layer(second)["x"] is not first:
            continue
        scales = layer["activation"] in ("none", "relu", "relu6") and layer["residual"] is None
        plain = (layer["post_activation"] or "none") == "none"
        own = all(len(Layer(n)["weight"].users) == 1 for n in (first, second))
        grouped = Layer(second)["groups"] not in (1, graph.weight(layer["weight"]).shape[0])
        if scales and plain and own and not grouped and Layer(second)["residual"] is not first:
            found.append((first, second))
    return found


def equalize(
    graph: Graph, batches: Sequence[tuple[Tensor, ...]], judged: Sequence[tuple[Tensor, ...]]
) -> dict[str, float | int | bool]:
    """Equalises all pairs of ``graph``, and keeps that when it lowers the output error of plain W8A8 on ``judged``.

    In place. Returns "pairs", "kept", and the errors "before" and "after".
    """
    found = pairs(graph)
    if not found:
        return {"pairs": 0, "kept": False}
    reference = float_outputs(graph, list(judged))
    before = _plain_error(graph, judged, reference)
    original = dict(graph.weights)
    _scale(graph, found, _largest(graph, batches, {first for first, _ in found}))
    after = _plain_error(graph, judged, reference)
    kept = after < before
    if not kept:
        graph.weights = original
    return {"pairs": len(found), "kept": kept, "before": before, "after": after}


def _largest(graph: Graph, batches, nodes: set[fx.Node]) -> dict[fx.Node, Tensor]:
    """The largest value of every output channel."""
    largest: dict[fx.Node, Tensor] = {}

    def observe(node, args, kwargs, output):
        if node in nodes:
            amax = output.float().amax((0, 2, 3))
            largest[node] = torch.maximum(largest[node], amax) if node in largest else amax

    for inputs in batches:
        graph.run(*inputs, observe=observe)
    return largest


def _scale(graph: Graph, found: list[tuple[fx.Node, fx.Node]], largest: dict[fx.Node, Tensor]) -> None:
    for _ in range(ROUNDS):
        moved = 0.0
        for first, second in found:
            one, two = Layer(first), Layer(second)
            names = one["weight"].target, two["weight"].target
            w1, w2 = (graph.weights[name] for name in names)
            depthwise = two["groups"] != 1
            r1 = w1.float().flatten(1).abs().amax(1)
            r2 = w2.float().abs().amax((1, 2, 3) if depthwise else (0, 2, 3))
            alive = (r1 > 0) & (r2 > 0)
            s = torch.where(alive, (r1 / r2.clamp(min=1e-30)).sqrt(), 1.0).clamp(1 / MOST, MOST)
            if one["activation"] == "relu6":
                most = largest[first] * MARGIN
                s = torch.where(most < 6, torch.maximum(s, most / 6), torch.ones_like(s))
            moved = max(moved, s.log().abs().max().item())
            graph.weights[names[0]] = (w1.float() / s.reshape(-1, 1, 1, 1)).to(w1.dtype)
            factor = s.reshape(-1, 1, 1, 1) if depthwise else s.reshape(1, -1, 1, 1)
            graph.weights[names[1]] = (w2.float() * factor).to(w2.dtype)
            if one["bias"] is not None:
                bias = graph.weights[one["bias"].target]
                graph.weights[one["bias"].target] = (bias.float() / s).to(bias.dtype)
            largest[first] = largest[first] / s
        if moved < 1e-3:
            return


def _plain_error(graph: Graph, judged, reference: tuple[Tensor, ...]) -> float:
    """Output error of nearest codes and whole ranges."""
    edges = observe_edges(graph, judged)
    ranges: Ranges = {node: edge.quantiser("min-max") for node, edge in edges.items()}
    weights = {}
    for node in graph.calls(ops.conv2d.default):
        layer = Layer(node)
        bias = None if layer["bias"] is None else graph.weight(layer["bias"])
        weights[node] = (nearest_rows(graph.weight(layer["weight"]), 8), bias)
    return output_error(reference, Simulation(graph, list(judged), ranges, weights).outputs())
