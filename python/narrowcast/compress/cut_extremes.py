"""How few and how many weights pruning may leave, before anything was measured."""

from __future__ import annotations

import math

import torch

from narrowcast.graph import Graph

from .channels import Channels
from .prune import MULTIPLE, Cost, Cut, Inputs, apply_cut, check, choose, cuttable, sizes

#: Choices of cuts that are drawn beside that which saves most weights and that which saves fewest.
DRAWS = 20


def cut_extremes(graph: Graph, inputs: Inputs, share: float, multiple: int = MULTIPLE) -> list[Graph]:
    """The graph with the fewest and with the most weights left, of many choices of what pruning may cut.

    Copies, for their shapes: no channel was looked at. Raises as :func:`.prune.prune_graph` does.
    """
    check(share, inputs)
    channels = Channels(graph)
    spaces, cost = cuttable(channels, multiple), Cost(graph, channels, inputs[0])
    generator = torch.Generator().manual_seed(0)
    found: dict[tuple[int, ...], int] = {}
    for draw in range(2 + DRAWS):
        cuts = [Cut(space, torch.arange(space.size), kept=space.size) for space in spaces]
        whole = cost.total(cuts), cost.weights(cuts)
        for cut in cuts:
            cut.errors[cut.space.size] = 0.0
            chance = math.exp(2 * torch.randn((), generator=generator).item())
            for kept in sizes(cut.space.size, multiple):
                cut.kept = kept
                macs, weights = whole[0] - cost.total(cuts), whole[1] - cost.weights(cuts)
                # Steps are chosen by error per multiply-add: rising with weights for each, falling, or as drawn.
                cut.errors[kept] = (weights, macs * macs / weights, macs * chance)[min(draw, 2)]
            cut.kept = cut.space.size
        choose(cuts, cost, share)
        found[tuple(cut.kept for cut in cuts)] = cost.weights(cuts)
    return [_cut(graph, kept, multiple) for kept in (min(found, key=found.get), max(found, key=found.get))]  # type: ignore[arg-type]


def _cut(graph: Graph, kept: tuple[int, ...], multiple: int) -> Graph:
    copy = graph.clone()
    copy.native = {}
    channels = Channels(copy)
    for space, count in zip(cuttable(channels, multiple), kept):
        if count < space.size:
            apply_cut(copy, channels, Cut(space, torch.arange(space.size), kept=count))
    copy.clean()
    return copy
