"""The forms that a convolution may take in a plan, see :mod:`.forms`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.int4_codes import add_codes
from narrowcast.graph.passes.match import Layer

from .adaround import RoundedConv, round_conv
from .cnn import can_have_4_bits, quantize_chosen, searched_ranges
from .items import Draft, Form, Item, Known, only
from .ranges import Ranges, fake_quantised
from .round_convs import round_alone
from .transformer import Decision
from .weights import sqnr_db

aten = torch.ops.aten

#: Float32 bytes of a weight up to which an executor unpacks it once, when it prepares a program. Up to twice that
#: a cast in every run is worth the bytes.
MOST_UNPACKED = 4 << 20


class ConvForm(Form):
    """Integer codes per output channel, or per group of ``size`` inputs, and a bias that takes up the mean error."""

    exact = False

    def __init__(self, name: str, bits: int, size: int = 0):
        self.name, self.bits, self.size = name, bits, size

    def key(self, graph: Graph, item: Item) -> tuple[int, int]:
        """(bits, weights that share a scale; 0: a channel's), where groups fit."""
        inputs = graph.weights[item.weight][0].numel()
        return self.bits, self.size if self.size and inputs % self.size == 0 and inputs > self.size else 0

    def fits(self, graph: Graph, item: Item) -> bool:
        return item.kind == "conv" and (self.bits == 8 or can_have_4_bits(graph, item.nodes[0]))

    def weight_bytes(self, graph: Graph, item: Item) -> int:
        weight, size = graph.weights[item.weight], self.key(graph, item)[1]
        scales = 2 * (weight.numel() // size) if size else 4 * weight.shape[0]
        made = 0 if Layer(item.nodes[0])["bias"] is not None else 4 * weight.shape[0]
        return weight.numel() * self.bits // 8 + scales + made

    def rounded(self, known: Known, item: Item) -> RoundedConv:
        """As :func:`round_forms` left it; without that, to the nearest codes."""
        bits, size = self.key(known.graph, item)
        if (item.name, bits, size) not in known.convs:
            layer, weight = Layer(item.nodes[0]), known.graph.weights[item.weight]
            bias = None if layer["bias"] is None else known.graph.weight(layer["bias"])
            made = round_conv(layer, weight, bias, None, bits, False, torch.Generator(), size)
            known.convs[item.name, bits, size] = made
        return known.convs[item.name, bits, size]

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        return self.rounded(known, item).dequantize(), None

    def bias(self, known: Known, item: Item) -> Tensor:
        return self.rounded(known, item).bias


class Unpacked(ConvForm):
    """int8 or packed int4 codes in the plan, float32 when it runs; images stay in float32."""

    finish = 9

    def fits(self, graph: Graph, item: Item) -> bool:
        if not super().fits(graph, item) or graph.weights[item.weight].numel() * 4 > MOST_UNPACKED:
            return False
        # Eight bits in groups that do not fit are eight bits in rows, which another form is.
        return self.bits == 4 or self.key(graph, item)[1] == self.size

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        return [self._unpacked(draft, item) for item in items]

    def _unpacked(self, draft: Draft, item: Item) -> Decision:
        graph, made = draft.graph, self.rounded(draft.known, item)
        node = draft.of[item.nodes[0]]
        attribute = Layer(node)["weight"]
        weight = graph.weights[item.weight]
        if made.bits == 4:
            codes = add_codes(graph, f"{item.name}.packed", made.codes, before=attribute)
        else:
            codes = graph.add_weight(f"{item.name}.q", made.codes, before=attribute)
        grouped = made.scale.dim() == 2
        scale = made.scale.half()[..., None] if grouped else made.scale.reshape(-1, 1, 1, 1)
        stored = graph.add_weight(f"{item.name}.scale", scale, before=attribute)
        values = graph.add_call(aten.to.dtype, (codes, torch.float32), like=attribute)
        if grouped:
            shape = [*made.scale.shape, -1]
            values = graph.add_call(aten.view.default, (values, shape), like=attribute)
        values = graph.add_call(aten.mul.Tensor, (values, stored), like=attribute)
        if grouped:
            values = graph.add_call(aten.view.default, (values, list(weight.shape)), like=attribute)
        graph.replace(attribute, values)
        bias = graph.add_weight(f"{item.name}.bias_corrected", made.bias, before=node)
        Layer(node).set(bias=bias)
        error = sqnr_db(weight.float(), made.dequantize())
        return Decision(
            item.name, "conv2d", f"int{made.bits}", sqnr_db=error, group_size=self.key(draft.known.graph, item)[1],
            why=f"rounded by {made.rule}; float32 when it runs", notes=made.notes,
        )  # fmt: skip


class ConvInt8(ConvForm):
    """conv2d_int8 between int8 edges; with weights of 4 bits these are packed in the plan."""

    finish = 4

    def stand_in(self, known: Known, item: Item) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        quantiser = ranges_of(known)[Layer(item.nodes[0])["x"]]
        return self.rounded(known, item).dequantize(), lambda x: fake_quantised(x, quantiser)

    def apply(self, draft: Draft, items: Sequence[Item]) -> list[Decision]:
        return together(draft, {item.name: self.bits for item in items}, items)


def ranges_of(known: Known) -> Ranges:
    """Searched when a form first asks: it takes long, and a plan of unpacked weights needs none."""
    if known.ranges is None:
        known.ranges = searched_ranges(known.graph, known.images)
    return known.ranges


def together(draft: Draft, bits: Mapping[str, int], items: Sequence[Item]) -> list[Decision]:
    """All layers that become conv2d_int8, at once: between two of them an image stays int8."""
    ranges = {draft.of[node]: quantiser for node, quantiser in ranges_of(draft.known).items()}
    return only(quantize_chosen(draft.graph, draft.known.images, ranges, bits), items)


def apply_forms(draft: Draft, choice: Sequence[tuple[Item, Form]]) -> list[Decision]:
    """Applies the form of every item."""
    by_form: dict[Form, list[Item]] = {}
    for item, form in choice:
        by_form.setdefault(form, []).append(item)
    decisions, int8 = [], [(i, f) for i, f in choice if isinstance(f, ConvInt8)]
    for form in sorted(by_form, key=lambda form: form.finish):
        if not isinstance(form, ConvInt8):
            decisions += form.apply(draft, by_form[form])
        elif int8:
            decisions += together(draft, {i.name: f.bits for i, f in int8}, [i for i, _ in int8])
            int8 = []
    return decisions


def round_forms(
    known: Known, items: Sequence[Item], progress: Callable[[str, int, int], object] | None = None
) -> None:
    """Rounds convolutions for every form that they may take."""
    wanted: dict[fx.Node, set[tuple[int, int]]] = {}
    names = {}
    for item in items:
        keys = {form.key(known.graph, item) for form in item.forms if isinstance(form, ConvForm)}
        if keys:
            wanted[item.nodes[0]], names[item.nodes[0]] = keys, item.name
    for node, made in round_alone(known.graph, list(known.images), wanted, progress).items():
        for (bits, size), rounded in made.items():
            known.convs[names[node], bits, size] = rounded
