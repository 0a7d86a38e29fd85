"""The forms that a layer may take in a plan, for the search: what each stores, loses and does to the graph.

:data:`FORMS` is the list. A form is added by a class with four answers (``fits``, ``weight_bytes``, ``stand_in``,
``apply``) and a line there; the search, its costs and its record know forms only through these. Those of
convolutions are in :mod:`.conv_forms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from narrowcast.formats import GroupedWeight, Int8Weight
from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer

from . import embedding
from .conv_forms import MOST_UNPACKED, ConvInt8, Unpacked
from .gptq import INT4, round_weight
from .items import Draft, Form, Item, Known, items_of, only
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

__all__ = [
    "FORMS",
    "ConvInt8",
    "Draft",
    "Form",
    "Grouped",
    "Int8",
    "Item",
    "Known",
    "Native",
    "Table",
    "items_of",
]

aten = torch.ops.aten
ops = torch.ops.narrowcast


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


class Int8(Form):
    """W8A8: int8 per channel, inputs to int8 per group of 64."""

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
        return only(quantize_int8(draft.graph, ours, 64, others, alphas), items)


class Grouped(Form):
    """Weights in groups along K with float16 scales, inputs as int8 in groups or as 16-bit integers."""

    exact = False

    def __init__(self, name: str, bits: int, group_size: int, activation_bits: int, symmetric: bool = False):
        self.name, self.bits, self.group_size, self.activation_bits = name, bits, group_size, activation_bits
        self.symmetric = symmetric
        self.finish = 1 if bits == 4 else 2

    def fits(self, graph: Graph, item: Item) -> bool:
        # A table that is gathered as well stays at 8 bits: its rows are the model's first layer.
        kinds = ("dense",) if self.bits == 4 else ("dense", "tied")
        return item.kind in kinds and graph.weights[item.weight].shape[1] % 32 == 0

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        n, k = graph.weights[item.weight].shape
        scales = n * (k // fitting_group(k, self.group_size)) * 2
        return n * k * self.bits // 8 + (2 * scales if self.bits == 4 and not self.symmetric else scales)

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        weight = known.graph.weights[item.weight]
        size = fitting_group(weight.shape[1], self.group_size)
        # To the nearest code: GPTQ, which comes later, loses less, and ranks layers much the same. A classifier,
        # which stands beside convolutions, is rounded before.
        if self.bits == 4 and item.name in known.rounded:
            quantised = known.rounded[item.name].dequantize()
        elif self.bits == 4:
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
            draft.others(items), symmetric=self.symmetric, rounded=rounded,
        )  # fmt: skip
        return only(decisions, items)


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
        return only(decisions, items)


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
    Unpacked("int8-weight", 8, 0),
    Unpacked("int8-groups", 8, 32),
    Unpacked("int4-weight", 4, 32),
    Int8(),
    ConvInt8("int8", 8),
    ConvInt8("int4", 4),
    Grouped("int8-weight", 8, 32, 16),
    Grouped("int4", 4, 32, 8),
    Native(),
    Table("int8", 8, 0),
    Table("int4", 4, 128),
]
