"""Convolutional networks to INT8 or, below that, W4A8: static uint8 activations whose ranges are searched by the
model's output, int8 edges between layers, weights per output channel rounded for what the layers before them make
of the pictures, and the few layers that carry most of the loss left in float or at 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.int4_codes import add_codes
from narrowcast.graph.passes.match import Layer, argument, calls

from .adaround import RoundedConv
from .equalize import equalize
from .ranges import Quantiser, Ranges, choose_method, observe_edges, output_error, refine_edges
from .round_convs import round_convs
from .simulation import Simulation, float_outputs
from .transformer import Decision, layer_name
from .weights import nearest_rows

aten = torch.ops.aten
ops = torch.ops.narrowcast

#: Layers left in float may hold this share of the weight multiply-adds together.
FLOAT_BUDGET = 0.045
#: A layer stands out when it alone causes this many times the median loss.
STANDS_OUT = 8.0
#: Between int8 layers, where it costs two conversions as well, it must cause this share of all loss.
DOMINATES = 0.2
#: Of the weights that could have 4 bits, the share that keeps 8 because it would lose most by it.
EIGHT_BIT_SHARE = 0.15
#: Pictures that ranges, equalisation and single layers' losses are judged on.
SEARCHED, JUDGED = 32, 8
#: Evaluations of the output that single edges get.
EDGE_TRIALS = 40

Batches = Sequence[tuple[Tensor, ...]]
Progress = Callable[[str, int, int], Any] | None


# --- preparation ----------------------------------------------------------------------------------


def weight_macs(graph: Graph, batches: Batches) -> dict[fx.Node, int]:
    """Multiply-adds of every layer for one image."""
    macs: dict[fx.Node, int] = {}

    def observe(node, args, kwargs, output):
        if calls(node, ops.conv2d.default):
            macs[node] = output[0].numel() * args[1][0].numel()
        elif calls(node, ops.linear.default):
            macs[node] = args[1].numel()

    graph.run(*batches[0], observe=observe)
    return macs


def sensitivity(
    graph: Graph, inputs: Batches, nearest: Mapping[fx.Node, Tensor], progress: Progress = None
) -> dict[fx.Node, float]:
    """Output error when one layer's weight alone is that of ``nearest``."""
    reference = float_outputs(graph, list(inputs))
    losses = {}
    for index, (node, rounded) in enumerate(nearest.items()):
        name = Layer(node)["weight"].target
        weight = graph.weights[name]
        graph.weights[name] = rounded.to(weight.dtype)
        losses[node] = output_error(reference, float_outputs(graph, list(inputs)))
        graph.weights[name] = weight
        if progress is not None:
            progress("sensitivity", index + 1, len(nearest))
    return losses


def median(losses: dict[fx.Node, float]) -> float:
    ordered = sorted(losses.values())
    return max(ordered[len(ordered) // 2], 1e-12) if ordered else 1e-12


def stand_out(losses: dict[fx.Node, float], macs: dict[fx.Node, int]) -> list[fx.Node]:
    """The layers to leave in float: far above the usual loss, within the budget of multiply-adds, and reading floats
    unless they dominate."""
    usual, whole = median(losses), sum(losses.values())
    total, spent, kept = sum(macs.values()), 0, []
    waiting = sorted(
        (n for n in losses if losses[n] >= STANDS_OUT * usual), key=losses.__getitem__, reverse=True
    )
    while waiting:
        chosen = next(
            (
                node for node in waiting
                if spent + macs.get(node, 0) <= FLOAT_BUDGET * total
                and (losses[node] >= DOMINATES * whole or reads_floats(node, kept))
            ),
            None,
        )  # fmt: skip
        if chosen is None:
            break
        waiting.remove(chosen)  # and the layers that read it are asked again
        kept.append(chosen)
        spent += macs.get(chosen, 0)
    return kept


def reads_floats(node: fx.Node, in_float: Collection[fx.Node]) -> bool:
    """Whether a layer's input comes from the graph's inputs or layers of ``in_float`` alone."""
    behind = [Layer(node)["x"]]
    while behind:
        source = behind.pop()
        if calls(source, ops.conv2d.default, ops.linear.default):
            if source not in in_float:
                return False
        else:
            behind += source.all_input_nodes
    return True


def eight_bit_layers(
    graph: Graph, candidates: Sequence[fx.Node], batches: Batches, share: float, progress: Progress = None
) -> set[fx.Node]:
    """Of layers that could have 4 bits those to leave at 8: most loss for each byte, ``share`` of their weights."""
    size = {node: graph.weight(Layer(node)["weight"]).numel() for node in candidates}
    nearest = {node: nearest_rows(graph.weight(Layer(node)["weight"]), 4) for node in candidates}
    losses = sensitivity(graph, batches, nearest, progress)
    kept, left = set(), share * sum(size.values())
    for node in sorted(candidates, key=lambda n: losses[n] / size[n], reverse=True):
        if size[node] <= left:
            kept.add(node)
            left -= size[node]
    return kept


def can_have_4_bits(graph: Graph, node: fx.Node) -> bool:
    """Dense convolutions of some depth; a depthwise filter has too few taps to make up for coarse codes."""
    weight = graph.weight(Layer(node)["weight"])
    return (Layer(node)["groups"] or 1) == 1 and weight[0].numel() >= 16 and weight.numel() % 2 == 0


def some(batches: Batches, pictures: int) -> list[tuple[Tensor, ...]]:
    """The first batches, as many as hold so many pictures; whole ones, as a model may take a fixed number."""
    taken: list[tuple[Tensor, ...]] = []
    for batch in batches:
        if sum(b[0].shape[0] for b in taken) < pictures:
            taken.append(batch)
    return taken


# --- the recipe -----------------------------------------------------------------------------------


def quantize_cnn(
    graph: Graph,
    batches: Batches,
    keep_float: Collection[str],
    progress: Progress = None,
    bits: int = 8,
) -> tuple[list[Decision], dict[str, Any]]:
    """Every convolution that does not stand out becomes conv2d_int8. In place.

    bits: of the weights, 8 or 4; at 4, depthwise layers and those that lose most keep 8.
    Returns what became of every layer, and what was tried: the output errors of the range rules, of the ranges
    chosen edge by edge and of equalisation.
    """
    searched = some(batches, SEARCHED)
    about: dict[str, Any] = {"equalisation": equalize(graph, batches, searched)}
    edges = observe_edges(graph, batches, progress)
    convolutions = list(graph.calls(ops.conv2d.default))
    judged = some(batches, JUDGED)
    nearest = {node: nearest_rows(graph.weight(Layer(node)["weight"]), 8) for node in convolutions}
    losses = sensitivity(graph, judged, nearest, progress)
    in_float = set(stand_out(losses, weight_macs(graph, batches)))
    usual = median(losses)
    decisions = []
    for node in convolutions:
        name = layer_name(Layer(node))
        if name in keep_float or node in in_float:
            why = "asked for" if name in keep_float else f"{losses[node] / usual:.0f} times the median loss"
            decisions.append(Decision(name, "conv2d", "float32", why=why))
            in_float.add(node)
    reference = float_outputs(graph, searched)

    def simulated(ranges: Ranges) -> float:
        return output_error(reference, Simulation(graph, searched, ranges, {}, in_float).outputs())

    ranges, about["ranges"] = choose_method(edges, simulated)
    bits_of = {node: 8 for node in convolutions if node not in in_float}
    if bits == 4:
        candidates = [node for node in bits_of if can_have_4_bits(graph, node)]
        eight = eight_bit_layers(graph, candidates, judged, EIGHT_BIT_SHARE, progress)
        bits_of |= {node: 4 for node in candidates if node not in eight}
    rounded = round_convs(
        graph, list(batches), ranges, bits_of, in_float, lambda node: bits_of[node] < 8, progress
    )

    def measured(ranges: Ranges) -> float:
        return output_error(reference, float_outputs(_int8(graph, rounded, ranges), searched))

    ranges, about["edges_with_a_range_of_their_own"] = refine_edges(edges, ranges, measured, EDGE_TRIALS)
    rewrite(graph, rounded, ranges)
    for made in rounded.values():
        why = f"rounded by {made.rule}"
        if bits == 4 and made.bits == 8:
            why = "8 bits: sensitive, or few taps"
        decisions.append(
            Decision(
                made.name, "conv2d_int8", f"int{made.bits}", sqnr_db=made.sqnr_db, why=why, notes=made.notes
            )
        )
    return decisions, about


def quantize_chosen(
    graph: Graph, batches: Batches, ranges: Ranges, bits: Mapping[str, int]
) -> list[Decision]:
    """The same where it is settled which layers have how many bits, by their names; others stay in float. In place.

    ranges: of the edges of this graph. Without AdaRound: a search makes many plans.
    """
    convolutions = list(graph.calls(ops.conv2d.default))
    bits_of = {n: bits[name] for n in convolutions if (name := layer_name(Layer(n))) in bits}
    in_float = {node for node in convolutions if node not in bits_of}
    rounded = round_convs(graph, list(batches), ranges, bits_of, in_float)
    rewrite(graph, rounded, ranges)
    return [
        Decision(
            c.name,
            "conv2d_int8",
            f"int{c.bits}",
            sqnr_db=c.sqnr_db,
            why=f"rounded by {c.rule}",
            notes=c.notes,
        )
        for c in rounded.values()
    ]


def searched_ranges(graph: Graph, batches: Batches, progress: Progress = None) -> Ranges:
    """Of the rule with the least output error when every convolution is int8."""
    edges, searched = observe_edges(graph, batches, progress), some(batches, SEARCHED)
    weights = {}
    for node in graph.calls(ops.conv2d.default):
        layer = Layer(node)
        bias = None if layer["bias"] is None else graph.weight(layer["bias"])
        weights[node] = (nearest_rows(graph.weight(layer["weight"]), 8), bias)
    reference = float_outputs(graph, searched)

    def simulated(ranges: Ranges) -> float:
        return output_error(reference, Simulation(graph, searched, ranges, weights).outputs())

    return choose_method(edges, simulated)[0]


def _int8(graph: Graph, rounded: Mapping[fx.Node, RoundedConv], ranges: Ranges) -> Graph:
    """A rewritten copy."""
    copy = graph.clone()
    of = {node.name: node for node in copy.fx.nodes}
    rewrite(
        copy,
        {of[node.name]: made for node, made in rounded.items()},
        {of[node.name]: quantiser for node, quantiser in ranges.items()},
        packed=False,
    )
    return copy


# --- rewriting ------------------------------------------------------------------------------------


def rewrite(
    graph: Graph, rounded: Mapping[fx.Node, RoundedConv], ranges: Ranges, packed: bool = True
) -> None:
    """Convolutions of ``rounded`` become conv2d_int8 between edges with the given ranges. In place.

    packed: keep codes of 4 bits as such; else as int8.
    """
    rewritten: dict[fx.Node, fx.Node] = {}
    quantised_of: dict[fx.Node, fx.Node] = {}  # float edge -> its uint8 form

    def as_uint8(source: fx.Node, before: fx.Node) -> fx.Node:
        if source not in quantised_of:
            arguments = (source, *ranges[source], torch.uint8)
            made = graph.add_call(ops.quantize_int8_static.default, arguments, like=before)
            quantised_of[source] = made
            # Right behind its source: a later reader may come before this one in program order.
            if source.op != "placeholder":
                source.append(made)
        return quantised_of[source]

    for node, conv in rounded.items():
        layer, name = Layer(node), conv.name
        x, residual, of_residual = as_uint8(layer["x"], node), layer["residual"], (1.0, 0)
        if residual is not None:
            of_residual = ranges[residual]
            residual = as_uint8(residual, node)
        if conv.bits == 4 and packed:
            codes = add_codes(graph, f"{name}.packed", conv.codes, before=node)
        else:
            codes = graph.add_weight(f"{name}.q", conv.codes, before=node)
        arguments = (
            x, *ranges[layer["x"]], codes,
            graph.add_weight(f"{name}.scale", conv.scale, before=node),
            graph.add_weight(f"{name}.bias_corrected", conv.bias, before=node),
            list(layer["stride"]), list(layer["padding"]), list(layer["dilation"]), layer["groups"],
            layer["activation"], residual, *of_residual, layer["post_activation"], *ranges[node], torch.uint8,
        )  # fmt: skip
        made = graph.add_call(ops.conv2d_int8.default, arguments, like=node)
        made.meta["val"] = node.meta["val"]
        rewritten[node] = quantised_of[node] = made

    # Later layers first: a float layer that is about to go needs no float input.
    for node, made in reversed(rewritten.items()):
        _serve_float_users(graph, node, made, ranges[node])
    graph.clean()


def _serve_float_users(graph: Graph, node: fx.Node, made: fx.Node, quantiser: Quantiser) -> None:
    """Users of a layer that want float: a global average pool reads the int8 image, others a dequantised one."""
    scale, zero = quantiser
    dequantised = None
    for user in list(node.users):
        if _is_global_pool(user):
            pooled = graph.add_call(ops.avg_pool2d_int8.default, (made, scale, zero), like=user)
            keeps = calls(user, aten.adaptive_avg_pool2d.default) or argument(user, 2, "keepdim", False)
            result = pooled if keeps else graph.add_call(aten.flatten.using_ints, (pooled, 1), like=user)
            graph.replace(user, result)
            continue
        if dequantised is None:
            factor = graph.add_weight(f"{made.name}.out_scale", torch.tensor(scale), before=user)
            offset = graph.add_weight(
                f"{made.name}.out_zero_point", torch.tensor(zero, dtype=torch.int32), before=user
            )
            arguments = (made, factor, offset)
            dequantised = graph.add_call(ops.dequantize_int8.default, arguments, like=user)
            made.append(dequantised)
            dequantised.prepend(factor)
            dequantised.prepend(offset)
        user.replace_input_with(node, dequantised)
    if not node.users:
        graph.fx.erase_node(node)


def _is_global_pool(node: fx.Node) -> bool:
    if calls(node, aten.adaptive_avg_pool2d.default):
        return list(node.args[1]) in ([1], [1, 1])
    if calls(node, aten.mean.dim):
        return sorted(a % 4 for a in node.args[1]) == [2, 3]
    return False
