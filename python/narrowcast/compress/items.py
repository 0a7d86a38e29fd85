"""What a search chooses between: layers, what is known of them, and the interface of a form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer

from . import embedding
from .adaround import RoundedConv
from .calibrate import Statistics
from .gptq import Rounded
from .ranges import Ranges
from .transformer import Decision, layer_name

aten = torch.ops.aten
ops = torch.ops.narrowcast

#: Smaller weights are not worth a form of their own.
LEAST_ELEMENTS = 1 << 12
#: Float32 bytes of a weight up to which an executor unpacks it once, when it prepares a program. Up to twice that
#: a cast in every run is worth the bytes.
MOST_UNPACKED = 4 << 20


@dataclass
class Item:
    """A layer to choose a form for. kind: "dense", "conv", "table", or "tied" (a dense layer over a table)."""

    name: str
    kind: str
    weight: str  #: its name in ``graph.weights``
    nodes: list[fx.Node]  #: of the float graph; several where layers share the weight
    forms: list[Form] = field(default_factory=list)  #: that fit, float32 first


def items_of(graph: Graph, forms: Sequence[Form], least: int = LEAST_ELEMENTS) -> list[Item]:
    """Every layer of a float graph with the forms that fit it; layers with float32 alone, and dense layers and
    tables of fewer than ``least`` weights, are left out."""
    tables = {
        n.args[0].target: n
        for n in graph.calls(aten.embedding.default)
        if graph.weight(n.args[0]) is not None
    }
    found: dict[str, Item] = {}
    for node in graph.calls(ops.linear.default, ops.conv2d.default):
        layer = Layer(node)
        key = layer["weight"].target if graph.weight(layer["weight"]) is not None else None
        if key is None or (graph.weights[key].numel() < least and node.target is ops.linear.default):
            continue
        kind = "conv" if node.target is ops.conv2d.default else "tied" if key in tables else "dense"
        found.setdefault(key, Item(layer_name(layer), kind, key, [])).nodes.append(node)
    for key, node in tables.items():
        if key not in found and graph.weights[key].numel() >= least:
            found[key] = Item(key.removesuffix(".weight"), "table", key, [node])
    for item in found.values():
        item.forms = [form for form in forms if form.fits(graph, item)]
    return [item for item in found.values() if len(item.forms) > 1]


@dataclass
class Known:
    """What forms are made from: the float graph, what its layers see, and what has been rounded already."""

    graph: Graph
    statistics: dict[fx.Node, Statistics]
    ranges: Ranges | None  #: of the images between convolutions; None: not looked for yet
    images: Sequence[tuple[Tensor, ...]]  #: calibration batches of an image model
    rounded: dict[str, Rounded] = field(default_factory=dict)  #: int4 weights, by the name of the layer
    #: Convolutions by the name of the layer, bits and weights per scale (0: a channel), each rounded alone.
    convs: dict[tuple[str, int, int], RoundedConv] = field(default_factory=dict)
    tables: dict[tuple[str, str], Any] = field(default_factory=dict)  #: (table, form) -> quantised, made once

    def square(self, item: Item) -> Tensor | None:
        found = self.statistics.get(item.nodes[0])
        return found.square if found is not None and found.rows else None


@dataclass
class Draft:
    """A copy of the float graph on its way to a plan. ``others``: layers that a form must leave alone."""

    graph: Graph
    of: dict[fx.Node, fx.Node]  #: node of the float graph -> its copy
    known: Known

    @classmethod
    def begin(cls, known: Known) -> Draft:
        graph = known.graph.clone()
        return cls(graph, dict(zip(known.graph.fx.nodes, graph.fx.nodes)), known)

    @property
    def statistics(self) -> dict[fx.Node, Statistics]:
        """Of the layers that are float still, as copies: smoothing rewrites what it reads."""
        kept, present = {}, set(self.graph.fx.nodes)
        for node, s in self.known.statistics.items():
            if self.of[node] in present:
                kept[self.of[node]] = Statistics(s.rows, s.amax, s.square, s.mean, s.sample, s.not_finite)
        return kept

    def others(self, items: Sequence[Item]) -> set[str]:
        chosen = {item.name for item in items}
        layers = [layer_name(Layer(n)) for n in self.graph.calls(ops.linear.default, ops.conv2d.default)]
        tables = [n.args[0].target.removesuffix(".weight") for n in embedding.large_tables(self.graph)]
        return {name for name in [*layers, *tables] if name not in chosen}


def only(decisions: list[Decision], items: Sequence[Item]) -> list[Decision]:
    names = {item.name for item in items}
    return [d for d in decisions if d.name in names]


class Form:
    """One form: float32 itself, which changes nothing."""

    name = "float32"
    exact = True  #: it computes what float32 computes, but for the last bits
    finish = 0  #: forms are applied in this order

    def fits(self, graph: Graph, item: Item) -> bool:
        return True

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        """Exact bytes of the weight with its scales in a plan."""
        return graph.weights[item.weight].nbytes

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """The weight in float as this form multiplies it, and what the form does to the layer's inputs."""
        return known.graph.weights[item.weight], None

    def bias(self, known: Known, item: Item) -> Tensor | None:
        """What takes the place of the layer's bias; None: it stays."""
        return None

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        """Rewrites these layers of ``draft.graph``, and no others."""
        return []
