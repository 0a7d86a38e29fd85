"""The forms that a layer may take in a plan, for the search: what each stores, loses and does to the graph.

:data:`FORMS` is the list. A form is added by a class with four answers (``fits``, ``weight_bytes``, ``stand_in``,
``apply``) and a line there; the search, its costs and its record know forms only through these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.formats import GroupedWeight, Int8Weight
from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer

from . import embedding
from .calibrate import Statistics
from .cnn import quantize_chosen
from .gptq import INT4, Rounded, round_weight
from .ranges import Edge
from .transformer import (
    Decision,
    activation_group,
    fitting_group,
    layer_name,
    quantize_grouped,
    quantize_int8,
    smooth,
)
from .weights import int8_rows, sqnr_db

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
    edges: dict[fx.Node, Edge]
    images: Sequence[tuple[Tensor, ...]]  #: calibration batches of an image model
    rounded: dict[str, Rounded] = field(default_factory=dict)  #: int4 weights, by the name of the layer
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


def _only(decisions: list[Decision], items: Sequence[Item]) -> list[Decision]:
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

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        """Rewrites these layers of ``draft.graph``, and no others."""
        return []


class Half(Form):
    """float16 in the plan, float32 when it runs."""

    name, exact, finish = "float16", False, 9

    def fits(self, graph: Graph, item: Item) -> bool:
        weight = graph.weights[item.weight]
        small = item.kind == "table" or weight.numel() * 4 <= 2 * MOST_UNPACKED
        return item.kind != "tied" and small and weight.dtype == torch.float32 and _in_half(weight)

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        return graph.weights[item.weight].numel() * 2

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, None]:
        return known.graph.weights[item.weight].half().float(), None

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        for item in items:
            nodes = [draft.of[n] for n in item.nodes]
            attribute = nodes[0].args[0 if item.kind == "table" else 1]
            half = draft.graph.add_weight(
                f"{item.name}.half", draft.graph.weights[item.weight].half(), attribute
            )
            if item.kind == "table":
                for node in nodes:
                    rows = draft.graph.add_call(
                        node.target, (half, *node.args[1:]), dict(node.kwargs), like=node
                    )
                    made = draft.graph.add_call(aten.to.dtype, (rows, torch.float32), like=node)
                    draft.graph.replace(node, made)
            else:
                made = draft.graph.add_call(aten.to.dtype, (half, torch.float32), like=attribute)
                draft.graph.replace(attribute, made)
        kinds = {"conv": "conv2d", "dense": "linear", "table": "embedding"}
        return [Decision(i.name, kinds[i.kind], "float16", why="float32 when it runs") for i in items]


def _in_half(weight: Tensor) -> bool:
    return weight.abs().max().item() < 65504


class Unpacked(Form):
    """int8 rows in the plan; a convolution in float32 when it runs."""

    name, exact, finish = "int8-weight", False, 9

    def fits(self, graph: Graph, item: Item) -> bool:
        return item.kind == "conv" and graph.weights[item.weight].numel() * 4 <= MOST_UNPACKED

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        weight = graph.weights[item.weight]
        return weight.numel() + 4 * weight.shape[0]

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, None]:
        weight = known.graph.weights[item.weight]
        return int8_rows(weight).dequantize().reshape(weight.shape), None

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        decisions = []
        graph = draft.graph
        for item in items:
            node = draft.of[item.nodes[0]]
            weight = graph.weights[item.weight]
            quantised = int8_rows(weight)
            attribute = Layer(node)["weight"]
            shape = [-1] + [1] * (weight.dim() - 1)
            q = graph.add_weight(f"{item.name}.q", quantised.q.reshape(weight.shape), before=attribute)
            scale = graph.add_weight(f"{item.name}.scale", quantised.scale.reshape(shape), before=attribute)
            values = graph.add_call(aten.to.dtype, (q, torch.float32), like=attribute)
            graph.replace(attribute, graph.add_call(aten.mul.Tensor, (values, scale), like=attribute))
            error = sqnr_db(weight.float(), quantised.dequantize().reshape(weight.shape))
            decisions.append(Decision(item.name, "conv2d", "int8", sqnr_db=error, why="float32 when it runs"))
        return decisions


class Int8(Form):
    """W8A8: int8 per channel, inputs to int8 per group of 64 (transformers) or by a static range (images)."""

    name, exact, finish = "int8", False, 3

    def fits(self, graph: Graph, item: Item) -> bool:
        return item.kind in ("dense", "tied")

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        weight = graph.weights[item.weight]
        return weight.numel() + 4 * weight.shape[0]

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        weight = known.graph.weights[item.weight]
        group = activation_group(weight.shape[1], 64)
        return int8_rows(weight, known.square(item)).dequantize(), lambda x: _int8(x, group)

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        found, others = draft.statistics, draft.others(items)
        ours = {n: s for n, s in found.items() if layer_name(Layer(n)) not in others}
        alphas = smooth(draft.graph, ours, 64)
        return _only(quantize_int8(draft.graph, ours, 64, others, alphas), items)


class ConvInt8(Int8):
    """conv2d_int8 with int8 edges; its bias takes what rounding does to a channel's mean."""

    finish = 4

    def fits(self, graph: Graph, item: Item) -> bool:
        return item.kind == "conv"

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        weight = known.graph.weights[item.weight]
        scale, zero = known.edges[Layer(item.nodes[0])["x"]].quantiser()
        restored = int8_rows(weight).dequantize().reshape(weight.shape)
        return restored, lambda x: (((x / scale).round() + zero).clamp(0, 255) - zero) * scale

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        edges = {draft.of[node]: edge for node, edge in draft.known.edges.items()}
        made = quantize_chosen(draft.graph, draft.known.images, edges, draft.others(items))
        return _only(made, items)


class Grouped(Form):
    """Weights in groups along K with float16 scales, inputs as int8 in groups or as 16-bit integers."""

    exact = False

    def __init__(self, name: str, bits: int, group_size: int, activation_bits: int):
        self.name, self.bits, self.group_size, self.activation_bits = name, bits, group_size, activation_bits
        self.finish = 1 if bits == 4 else 2

    def fits(self, graph: Graph, item: Item) -> bool:
        # A table that is gathered as well stays at 8 bits: its rows are the model's first layer.
        kinds = ("dense",) if self.bits == 4 else ("dense", "tied")
        return item.kind in kinds and graph.weights[item.weight].shape[1] % 32 == 0

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        n, k = graph.weights[item.weight].shape
        scales = n * (k // fitting_group(k, self.group_size)) * 2
        return n * k * self.bits // 8 + (2 * scales if self.bits == 4 else scales)

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        weight = known.graph.weights[item.weight]
        size = fitting_group(weight.shape[1], self.group_size)
        # To the nearest code: GPTQ, which comes later, loses less, and ranks layers much the same.
        if self.bits == 4:
            quantised = round_weight(weight, None, INT4, size).dequantize()
        else:
            quantised = _nearest_int8(weight, size)
        block = math.gcd(size, 128)
        return quantised, None if self.activation_bits == 16 else lambda x: _int8(x, block)

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        rounded = {}
        for item in items:
            for node in item.nodes:
                if item.name in draft.known.rounded and self.bits == 4:
                    rounded[draft.of[node]] = draft.known.rounded[item.name]
        decisions = quantize_grouped(
            draft.graph, draft.statistics, self.bits, self.group_size, self.activation_bits,
            draft.others(items), rounded=rounded,
        )  # fmt: skip
        return _only(decisions, items)


class Native(Form):
    """The file's own codes with 16-bit inputs: nothing is requantised."""

    name, exact, finish = "native", True, 0

    def fits(self, graph: Graph, item: Item) -> bool:
        own = graph.native.get(item.weight)
        return (
            item.kind in ("dense", "tied")
            and isinstance(own, GroupedWeight)
            and own.columns is None
            and own.group_size % 32 == 0
        )

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        own = graph.native[item.weight]
        assert isinstance(own, GroupedWeight)
        parts = (own.packed, own.scale, own.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        decisions = quantize_grouped(draft.graph, {}, 4, 32, 16, draft.others(items), native=True)
        return _only(decisions, items)


class Table(Form):
    """A table whose rows are gathered as int8 (group_size 0: a scale per row) or int4, and then unpacked."""

    exact = False

    def __init__(self, name: str, bits: int, group_size: int):
        self.name, self.bits, self.group_size = name, bits, group_size

    def fits(self, graph: Graph, item: Item) -> bool:
        width = graph.weights[item.weight].shape[1]
        return (
            item.kind == "table"
            and len(item.nodes) == 1
            and (not self.group_size or width % self.group_size == 0)
        )

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        n, k = graph.weights[item.weight].shape
        return n * k * self.bits // 8 + (4 * n * (k // self.group_size) if self.group_size else 4 * n)

    def _quantised(self, known: Known, item: Item) -> Int8Weight | GroupedWeight:
        key = (item.name, self.name)
        if key not in known.tables:
            table = known.graph.weights[item.weight]
            if self.group_size:
                known.tables[key] = round_weight(table, None, INT4, self.group_size).weight()
            else:
                known.tables[key] = int8_rows(table)
        return known.tables[key]

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, None]:
        return self._quantised(known, item).dequantize(), None

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        decisions = []
        for item in items:
            node, weight = draft.of[item.nodes[0]], self._quantised(draft.known, item)
            named = (
                {"q": weight.q, "scale": weight.scale}
                if isinstance(weight, Int8Weight)
                else {"packed": weight.packed, "scale": weight.scale, "offset": weight.offset}
            )
            parts = {
                part: None
                if tensor is None
                else draft.graph.add_weight(f"{item.name}.{part}", tensor, before=node)
                for part, tensor in named.items()
            }
            error = sqnr_db(draft.graph.weights[item.weight].float(), weight.dequantize())
            embedding.gather(draft.graph, node, parts, weight)
            decisions.append(
                Decision(item.name, "embedding", f"int{self.bits}", sqnr_db=error, group_size=self.group_size)
            )
        return decisions


def _int8(x: Tensor, group: int) -> Tensor:
    q, scale = ops.quantize_int8(x, group)
    return ops.dequantize_int8(q, scale, None, group)


def _nearest_int8(weight: Tensor, group_size: int) -> Tensor:
    groups = weight.float().unflatten(1, (-1, group_size))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
    scale = torch.where(scale == 0, 1.0, scale)
    return ((groups / scale).round().clamp(-127, 127) * scale).flatten(1)


#: What the search chooses from. Order does not matter, but for float32, which comes first.
FORMS: list[Form] = [
    Form(),
    Half(),
    Unpacked(),
    Int8(),
    ConvInt8(),
    Grouped("int8-weight", 8, 32, 16),
    Grouped("int4", 4, 32, 8),
    Native(),
    Table("int8", 8, 0),
    Table("int4", 4, 128),
]
