"""How few and how many bytes pruning may leave, before anything was measured."""

from __future__ import annotations

import torch

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer

from .channels import Channels, Space
from .prune import MULTIPLE, Cost, Cut, Inputs, apply_cut, check, choose, cuttable, sizes


def cut_extremes(graph: Graph, inputs: Inputs, share: float, multiple: int = MULTIPLE) -> list[Graph]:
    """What is left of a graph when the cuts are those that save most bytes, and those that save fewest.

    Copies, for their shapes: no channel was looked at. Raises as :func:`prune_graph` does.
    """
    check(share, inputs)
    made = []
    for most in (True, False):
        copy = graph.clone()
        copy.native = {}
        channels = Channels(copy)
        found = cuttable(channels, multiple)
        cost = Cost(copy, channels, inputs[0])
        cuts = [Cut(space, torch.arange(space.size), kept=space.size) for space in found]
        before = cost.total(cuts)
        for cut in cuts:
            cut.errors[cut.space.size] = 0.0
            for kept in sizes(cut.space.size, multiple):
                cut.kept = kept
                macs, saved = before - cost.total(cuts), _numbers(copy, cut.space) * (cut.space.size - kept)
                # The rate that cuts are chosen by, an error per multiply-add, rises or falls with bytes for each.
                cut.errors[kept] = macs * macs / saved if most else saved
            cut.kept = cut.space.size
        choose(cuts, cost, share)
        for cut in cuts:
            if cut.kept < cut.space.size:
                apply_cut(copy, channels, cut)
        copy.clean()
        made.append(copy)
    return made


def _numbers(graph: Graph, space: Space) -> float:
    """Weights that go with one channel."""
    made = {node for node, _ in space.producers} | set(space.depthwise)
    rows = sum(graph.weight(Layer(n)["weight"])[0].numel() for n in made)
    return rows + sum(graph.weight(Layer(n)["weight"]).numel() / space.size for n, _ in space.readers)
