"""Dense layers to INT8 (W8A8), or to weights in groups (W4, W8), with the scales that their inputs ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, fx

from narrowcast.formats import GroupedWeight, Int8Weight
from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer, calls

from . import embedding
from .calibrate import Statistics
from .gptq import INT4, INT4_SYMMETRIC, INT8_ROWS, Rounded
from .sequential import Target
from .weights import grouped, int8_rows, sqnr_db

aten = torch.ops.aten
ops = torch.ops.narrowcast

ALPHAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass
class Decision:
    """What became of one layer, and why."""

    name: str
    op: str
    precision: str
    sqnr_db: float | None = None
    alpha: float | None = None
    group_size: int = 0
    why: str = ""
    damping: float | None = None  #: what GPTQ added to the diagonal of the Hessian, relative to its mean
    dead: int = 0  #: inputs that were zero in all of the calibration data
    notes: list[str] = field(default_factory=list)  #: what a user should know of; become warnings
    #: Of a search: every form that the layer could take, with its bytes, cost and loss.
    candidates: list[dict] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)


def layer_name(layer: Layer) -> str:
    name = layer["weight"].target
    for suffix in (".folded", ".weight", ".conv"):
        name = name.removesuffix(suffix)
    return name


# --- smoothing ------------------------------------------------------------------------------------


def smooth(graph: Graph, statistics: dict[fx.Node, Statistics], group_size: int) -> dict[fx.Node, float]:
    """SmoothQuant: moves outliers of activations into weights, where a norm or a gate can take the inverse.

    For each norm that only feeds dense layers, and each gated activation that feeds one, the exponent is
    searched by the layer's output error under the real quantisers; 0 leaves things as they are. Xiao et al.,
    "SmoothQuant", 2022. Returns the exponent per layer.
    """
    chosen: dict[fx.Node, float] = {}
    for node in list(graph.calls(ops.rms_norm.default, ops.layer_norm.default, ops.silu_mul.default)):
        users = list(node.users)
        if not users or not all(calls(u, ops.linear.default) and u.args[0] is node for u in users):
            continue
        if any(u not in statistics or statistics[u].rows == 0 for u in users):
            continue
        layers = [Layer(u) for u in users]
        if any(len(layer["weight"].users) > 1 for layer in layers):
            continue  # a tied table must keep its values
        target = _scalable(graph, node)
        if target is None:
            continue
        found = statistics[users[0]]
        weights = [graph.weight(layer["weight"]).float() for layer in layers]
        depth = weights[0].shape[1]
        alpha, scale = _search(found, torch.cat(weights), activation_group(depth, group_size))
        for user in users:
            chosen[user] = alpha
        if alpha == 0.0:
            continue
        target(scale)
        for layer, weight in zip(layers, weights):
            name = layer["weight"].target
            graph.weights[name] = (weight * scale).to(graph.weights[name].dtype)
            graph.native.pop(name, None)
        for user in users:
            s = statistics[user]
            s.amax, s.mean, s.sample = s.amax / scale, s.mean / scale, s.sample / scale
            s.square = s.square / scale.square()
    return chosen


def _scalable(graph: Graph, node: fx.Node):
    """A function that divides the node's output channels by a scale, or None."""
    if calls(node, ops.silu_mul.default):
        up = node.args[1]
        source, first, last = up, 0, None
        if calls(up, aten.slice.Tensor) and up.args[1] == -1:
            source, first, last = up.args[0], up.args[2], up.args[3]
        if not calls(source, ops.linear.default) or len(up.users) > 1:
            return None
        layer = Layer(source)
        if layer["activation"] != "none" or len(layer["weight"].users) > 1:
            return None

        def divide_rows(scale: Tensor) -> None:
            name = layer["weight"].target
            weight = graph.weights[name].clone()
            weight[first:last] /= scale[:, None]
            graph.weights[name] = weight
            graph.native.pop(name, None)
            if layer["bias"] is not None:
                bias = graph.weights[layer["bias"].target].clone()
                bias[first:last] /= scale
                graph.weights[layer["bias"].target] = bias

        return divide_rows
    attributes = [a for a in node.args[1:3] if isinstance(a, fx.Node) and a.op == "get_attr"]
    if not attributes or any(len(a.users) > 1 for a in attributes):
        return None

    def divide(scale: Tensor) -> None:
        for attribute in attributes:
            graph.weights[attribute.target] = graph.weights[attribute.target] / scale

    return divide


def _search(found: Statistics, weight: Tensor, group_size: int) -> tuple[float, Tensor]:
    x = found.sample
    reference = x @ weight.t()
    amax = found.amax.clamp(min=1e-5)
    column = weight.abs().amax(0).clamp(min=1e-5)
    best = (float("inf"), 0.0, torch.ones_like(amax))
    for alpha in ALPHAS:
        scale = (
            torch.ones_like(amax) if alpha == 0.0 else (amax**alpha / column ** (1 - alpha)).clamp(1e-5, 1e5)
        )
        if alpha:
            scale = scale / scale.log().mean().exp()  # only ratios matter; keep the weights' size
        q = _fake_weight(weight * scale)
        error = (_fake_activation(x / scale, group_size) @ q.t() - reference).square().sum().item()
        # Without a real gain the simpler graph stays.
        if error < best[0] * (0.98 if best[1] == 0.0 else 1.0):
            best = (error, alpha, scale)
    return best[1], best[2]


def _fake_weight(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() * scale


def _fake_activation(x: Tensor, group_size: int) -> Tensor:
    q, scale = ops.quantize_int8(x, group_size)
    return ops.dequantize_int8(q, scale, None, group_size)


# --- W8A8 -----------------------------------------------------------------------------------------


def activation_group(depth: int, wanted: int) -> int:
    """The largest group up to ``wanted`` that divides a layer's inputs, or 0 (one scale per token)."""
    return fitting_group(depth, wanted, 0) if depth > wanted else 0


def fitting_group(depth: int, wanted: int, otherwise: int = 32) -> int:
    """The largest multiple of 32 up to ``wanted`` that divides ``depth``, or ``otherwise``."""
    return next((size for size in range(wanted, 0, -32) if depth % size == 0), otherwise)


def _fallback(depth: int, wanted: int, size: int) -> list[str]:
    """What to say of a layer whose groups are not the wanted ones."""
    if size == wanted or depth <= wanted:
        return []
    instead = f"it has groups of {size}" if size else "it has one scale per token"
    return [f"groups of {wanted} do not divide its {depth} inputs: {instead}"]


def int8_targets(graph: Graph, group_size: int, keep_float: set[str]) -> dict[fx.Node, Target]:
    """The dense layers whose weights quantize_int8 makes int8, for round_in_sequence."""
    tables = {node.args[0].target for node in embedding.large_tables(graph)}
    targets = {}
    for node in graph.calls(ops.linear.default):
        layer = Layer(node)
        name, depth = layer_name(layer), graph.weight(layer["weight"]).shape[1]
        if name not in keep_float and layer["weight"].target not in tables:
            targets[node] = Target(name, INT8_ROWS, depth, 8, activation_group(depth, group_size))
    return targets


def quantize_int8(
    graph: Graph,
    statistics: dict[fx.Node, Statistics],
    group_size: int,
    keep_float: set[str],
    alphas: Mapping[fx.Node, float] = MappingProxyType({}),
    rounded: Mapping[fx.Node, Rounded] = MappingProxyType({}),
) -> list[Decision]:
    """Every dense layer becomes linear_dynamic_int8; large tables become int8 rows. In place.

    alphas: what smooth chose. rounded: layers whose weights round_in_sequence has made; the others go to the
    nearest code, and what that adds to their outputs on average is taken from their bias.
    """
    decisions = []
    shared: dict[str, tuple[dict, Int8Weight]] = {}
    for node in list(graph.calls(ops.linear.default)):
        layer = Layer(node)
        name, weight = layer_name(layer), graph.weight(layer["weight"])
        if name in keep_float:
            decisions.append(Decision(name, "linear", "float32", why="asked for"))
            continue
        found = statistics.get(node)
        has_data = found is not None and found.rows > 0
        made = rounded.get(node)
        quantised = int8_rows(weight, found.square if has_data else None) if made is None else made.rows()
        group = activation_group(weight.shape[1], group_size)
        bias, correction = layer["bias"], None
        if bias is not None and has_data and made is None:
            correction = (weight.float() - quantised.dequantize()) @ found.mean
            value = graph.weight(bias)
            bias = graph.add_weight(
                f"{name}.bias_corrected", (value.float() + correction).to(value.dtype), before=node
            )
        parts = _rows(graph, name, quantised, node)
        shared[layer["weight"].target] = (parts, quantised)
        decision = Decision(name, "linear_dynamic_int8", "int8", alpha=alphas.get(node), group_size=group)
        decision.notes += _fallback(weight.shape[1], group_size, group)
        if made is not None:
            decision.damping, decision.dead, decision.sqnr_db = made.damping, made.dead, made.sqnr_db
            decision.notes += made.notes
        elif has_data:
            reference = found.sample @ weight.float().t()
            ours = _fake_activation(found.sample, group) @ quantised.dequantize().t()
            ours = ours if correction is None else ours + correction
            decision.sqnr_db = sqnr_db(reference, ours)
        else:
            decision.notes.append("no calibration data reached it")
        decisions.append(decision)
        arguments = (
            layer["x"], parts["q"], parts["scale"], bias, layer["activation"], layer["residual"],
            layer["out_dtype"],
        )  # fmt: skip
        options = {"group_size": group, "post_activation": layer["post_activation"]}
        graph.replace(node, graph.add_call(ops.linear_dynamic_int8.default, arguments, options, like=node))

    def table(node: fx.Node, name: str) -> tuple[embedding.Parts, Int8Weight] | None:
        if name in keep_float:
            decisions.append(Decision(name, "embedding", "float32", why="asked for"))
            return None
        quantised = int8_rows(graph.weight(node.args[0]))
        return _rows(graph, name, quantised, node), quantised

    for name, original, quantised in embedding.quantize_tables(graph, shared, table):
        error = sqnr_db(original.float(), quantised.dequantize())
        decisions.append(Decision(name, "embedding", "int8", sqnr_db=error))
    graph.clean()
    return decisions


def _rows(graph: Graph, name: str, weight: Int8Weight, before: fx.Node) -> embedding.Parts:
    return {
        "q": graph.add_weight(f"{name}.q", weight.q, before=before),
        "scale": graph.add_weight(f"{name}.scale", weight.scale, before=before),
    }


# --- weights in groups ----------------------------------------------------------------------------


def int4_targets(
    graph: Graph, group_size: int, activation_bits: int, keep_float: set[str], symmetric: bool = False
) -> dict[fx.Node, Target]:
    """The dense layers whose weights quantize_grouped makes int4, for round_in_sequence."""
    tables = {node.args[0].target for node in embedding.large_tables(graph)}
    grid = INT4_SYMMETRIC if symmetric else INT4
    targets = {}
    for node in graph.calls(ops.linear.default):
        layer = Layer(node)
        name, depth = layer_name(layer), graph.weight(layer["weight"]).shape[1]
        if name not in keep_float and layer["weight"].target not in tables and depth % 32 == 0:
            targets[node] = Target(name, grid, fitting_group(depth, group_size), activation_bits)
    return targets


def quantize_grouped(
    graph: Graph,
    statistics: dict[fx.Node, Statistics],
    bits: int,
    group_size: int,
    activation_bits: int,
    keep_float: set[str],
    *,
    native: bool = False,
    symmetric: bool = False,
    rounded: Mapping[fx.Node, Rounded] = MappingProxyType({}),
) -> list[Decision]:
    """Every dense layer becomes linear_grouped.

    native: by the file's own codes where it has them. rounded: layers whose weights round_in_sequence has
    made; the others go to the nearest code under scales that their ``statistics`` ask for.
    """
    decisions = []
    shared: dict[str, tuple[dict, GroupedWeight]] = {}
    tables = {node.args[0].target for node in embedding.large_tables(graph)}
    for node in list(graph.calls(ops.linear.default)):
        layer = Layer(node)
        name, weight = layer_name(layer), graph.weight(layer["weight"])
        own = graph.native.get(layer["weight"].target)
        why = "asked for" if name in keep_float else _why_float(own, weight, native)
        if native and isinstance(own, GroupedWeight) and own.columns is not None:
            why = why or ("its rows are gathered, too" if layer["weight"].target in tables else "")
        if native and not why and isinstance(own, Int8Weight):
            decisions.append(_native_int8(graph, node, layer, name, own))
            continue
        if why:
            decisions.append(Decision(name, "linear", "float32", why=why))
            continue
        found = statistics.get(node)
        importance = found.square if found is not None and found.rows else None
        made = rounded.get(node)
        if made is not None:
            quantised = made.weight()
        elif native:
            quantised = own
        elif layer["weight"].target in tables:
            # A table that is gathered as well stays at 8 bits: its rows are the model's first layer.
            exact = isinstance(own, GroupedWeight) and own.bits == 8 and not _why_float(own, weight, True)
            quantised = own if exact and own.columns is None else grouped(weight, 8, 32)
        else:
            size = fitting_group(weight.shape[1], group_size)
            quantised = grouped(weight, bits, size, importance, symmetric)
        parts = _groups(graph, name, quantised, node)
        shared[layer["weight"].target] = (parts, quantised)
        decision = Decision(name, "linear_grouped", f"int{quantised.bits}", group_size=quantised.group_size)
        decision.why = "the file's own codes" if quantised is own else ""
        if made is not None:
            decision.damping, decision.dead, decision.notes = made.damping, made.dead, list(made.notes)
            decision.sqnr_db = made.sqnr_db
        elif importance is not None:
            reference = found.sample @ weight.float().t()
            decision.sqnr_db = sqnr_db(reference, found.sample @ quantised.dequantize().t())
        if quantised is not own and layer["weight"].target not in tables:
            decision.notes += _fallback(weight.shape[1], group_size, quantised.group_size)
        decisions.append(decision)
        x = layer["x"]
        if quantised.columns is not None:
            order = graph.add_weight(f"{name}.columns", quantised.columns, before=node)
            x = graph.add_call(aten.index_select.default, (x, -1, order), like=node)
            x.meta["val"] = layer["x"].meta.get("val")
        arguments = (
            x, parts["packed"], parts["scale"], parts["offset"], quantised.group_size, quantised.bits,
            layer["bias"], layer["activation"], layer["residual"], layer["out_dtype"],
        )  # fmt: skip
        options = {"activation_bits": activation_bits, "post_activation": layer["post_activation"]}
        graph.replace(node, graph.add_call(ops.linear_grouped.default, arguments, options, like=node))

    def table(node: fx.Node, name: str) -> tuple[embedding.Parts, GroupedWeight] | None:
        own = graph.native.get(node.args[0].target)
        exact = isinstance(own, GroupedWeight) and own.columns is None
        if name in keep_float:
            decisions.append(Decision(name, "embedding", "float32", why="asked for"))
            return None
        if native and not exact:
            return None
        quantised = own if exact else grouped(graph.weight(node.args[0]), 8, 32)
        return _groups(graph, name, quantised, node), quantised

    for name, _, quantised in embedding.quantize_tables(graph, shared, table):
        decisions.append(Decision(name, "embedding", f"int{quantised.bits}", group_size=quantised.group_size))
    graph.clean()
    return decisions


def _why_float(own: GroupedWeight | Int8Weight | None, weight: Tensor, native: bool) -> str:
    """Why linear_grouped cannot run a layer, or nothing."""
    if native and own is None:
        return "the file holds it in float, or in values of a table"
    if native and isinstance(own, GroupedWeight) and own.group_size % 32:
        return f"there is no kernel for groups of {own.group_size}"
    if weight.shape[1] % 32 and not (native and isinstance(own, Int8Weight)):
        return "K % 32 != 0"
    return ""


def _native_int8(graph: Graph, node: fx.Node, layer: Layer, name: str, weight: Int8Weight) -> Decision:
    """A file's own int8 rows, its inputs to int8 per token while it runs."""
    parts = _rows(graph, name, weight, node)
    arguments = (
        layer["x"], parts["q"], parts["scale"], layer["bias"], layer["activation"], layer["residual"],
        layer["out_dtype"],
    )  # fmt: skip
    options = {"post_activation": layer["post_activation"]}
    graph.replace(node, graph.add_call(ops.linear_dynamic_int8.default, arguments, options, like=node))
    return Decision(name, "linear_dynamic_int8", "int8", why="the file's own codes")


def _groups(graph: Graph, name: str, weight: GroupedWeight, before: fx.Node) -> embedding.Parts:
    return {
        "packed": graph.add_weight(f"{name}.packed", weight.packed, before=before),
        "scale": graph.add_weight(f"{name}.scale", weight.scale, before=before),
        "offset": None
        if weight.offset is None
        else graph.add_weight(f"{name}.offset", weight.offset, before=before),
    }
