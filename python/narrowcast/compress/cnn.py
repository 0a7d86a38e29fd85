"""Convolutional networks to INT8: static uint8 activations whose ranges are searched, int8 edges between
layers, per-channel weights, bias correction, and the few layers that carry most of the loss left in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.formats import Int8Weight
from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer, argument, calls, only_user

from .transformer import Decision, layer_name
from .weights import int8_rows, sqnr_db

aten = torch.ops.aten
ops = torch.ops.narrowcast

#: Values of an edge kept to search its range on.
_SAMPLE = 1 << 16
#: Layers left in float may hold this share of the weight multiply-adds together.
FLOAT_BUDGET = 0.045
#: A layer stands out when it alone causes this many times the median loss.
STANDS_OUT = 8.0


@dataclass
class Edge:
    """What an image between two layers looks like, over the calibration images."""

    low: float = 0.0
    high: float = 0.0
    sample: Tensor | None = None
    mean: Tensor | None = None  #: per channel
    images: int = 0

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        x = x.float()
        self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())
        mean = x.mean((0, 2, 3))
        if self.mean is None:
            self.mean, self.sample = mean, x.new_empty(0)
        else:
            self.mean = self.mean + (mean - self.mean) * (x.shape[0] / (self.images + x.shape[0]))
        self.images += x.shape[0]
        flat = x.flatten()
        picked = flat[torch.randint(flat.numel(), (4096,), generator=generator)]
        self.sample = torch.cat((self.sample, picked))[-_SAMPLE:]

    def quantiser(self) -> tuple[float, int]:
        """(scale, zero point) of uint8, the range that leaves the least squared error on the sample."""
        ordered = self.sample.sort().values
        best = (float("inf"), 1.0, 0)
        for share in (0.0, 1e-5, 1e-4, 5e-4, 1e-3):
            cut = int(share * ordered.numel())
            low = min(0.0, self.low if cut == 0 else ordered[cut].item())
            high = max(0.0, self.high if cut == 0 else ordered[-1 - cut].item())
            scale = max((high - low) / 255, 1e-8)
            zero = max(0, min(255, round(-low / scale)))
            q = ((ordered / scale).round() + zero).clamp(0, 255)
            error = ((q - zero) * scale - ordered).square().sum().item()
            if error < best[0]:
                best = (error, scale, zero)
        return best[1], best[2]


# --- preparation ----------------------------------------------------------------------------------


def absorb_padding(graph: Graph) -> int:
    """A layer after uneven padding becomes a layer with even padding and a kernel that begins with zeros.

    TensorFlow's "same" with stride 2 pads at the end only. Layers of few channels keep the pad: there the
    larger kernel would cost more than the copy.
    """
    count = 0
    for node in graph.calls(ops.conv2d.default):
        layer = Layer(node)
        pad = layer["x"]
        if not calls(pad, aten.pad.default, aten.constant_pad_nd.default) or only_user(pad) is not node:
            continue
        amounts = list(pad.args[1])
        mode = argument(pad, 2, "mode", "constant") if pad.target is aten.pad.default else "constant"
        fill = argument(pad, 3, "value") if pad.target is aten.pad.default else argument(pad, 2, "value", 0)
        weight = graph.weight(layer["weight"])
        channels = weight.shape[1] * layer["groups"]
        if len(amounts) != 4 or mode != "constant" or fill not in (None, 0, 0.0) or channels < 8:
            continue
        if list(layer["padding"] or [0, 0]) != [0, 0] or list(layer["dilation"] or [1, 1]) != [1, 1]:
            continue
        left, right, top, bottom = amounts
        if min(amounts) < 0:
            continue
        width, height = max(left, right), max(top, bottom)
        # Zeros before the kernel stand for the padding that is missing at the start, zeros after it at the end.
        extended = torch.nn.functional.pad(
            weight, (width - left, width - right, height - top, height - bottom)
        )
        name = layer["weight"].target
        layer.set(
            x=pad.args[0],
            weight=graph.add_weight(f"{name}.padded", extended, before=node),
            padding=[height, width],
        )
        count += 1
    graph.clean()
    return count


def observe_edges(
    graph: Graph, batches: Sequence[tuple[Tensor, ...]], progress: Callable[[str, int, int], Any] | None
) -> dict[fx.Node, Edge]:
    """Every image that a convolution reads, adds or makes."""
    generator = torch.Generator().manual_seed(0)
    edges: dict[fx.Node, Edge] = {}
    for index, inputs in enumerate(batches):
        seen: set[fx.Node] = set()

        def observe(node, args, kwargs, output, seen=seen):
            if not calls(node, ops.conv2d.default):
                return
            layer = Layer(node)
            if layer["x"] not in seen:
                edges.setdefault(layer["x"], Edge()).add(args[0], generator)
                seen.add(layer["x"])
            edges.setdefault(node, Edge()).add(output, generator)
            seen.add(node)

        graph.run(*inputs, observe=observe)
        if progress is not None:
            progress("calibrating", index + 1, len(batches))
    return edges


def weight_macs(graph: Graph, batches: Sequence[tuple[Tensor, ...]]) -> dict[fx.Node, int]:
    """Multiply-adds of every layer for one image."""
    macs: dict[fx.Node, int] = {}

    def observe(node, args, kwargs, output):
        if calls(node, ops.conv2d.default):
            weight = args[1]
            macs[node] = output[0].numel() * weight[0].numel()
        elif calls(node, ops.linear.default):
            macs[node] = args[1].numel()

    graph.run(*(x[:1] for x in batches[0]), observe=observe)
    return macs


def sensitivity(
    graph: Graph,
    inputs: tuple[Tensor, ...],
    rounded: dict[fx.Node, Int8Weight],
    progress: Callable[[str, int, int], Any] | None,
) -> dict[fx.Node, float]:
    """KL divergence of the outputs when one layer's weights alone are those of ``rounded``."""
    reference = graph.run(*inputs)[0].float().log_softmax(-1)
    losses = {}
    for index, (node, quantised) in enumerate(rounded.items()):
        name = Layer(node)["weight"].target
        weight = graph.weights[name]
        graph.weights[name] = _dequantised(quantised, weight)
        ours = graph.run(*inputs)[0].float().log_softmax(-1)
        graph.weights[name] = weight
        losses[node] = (reference.exp() * (reference - ours)).sum(-1).mean().item()
        if progress is not None:
            progress("sensitivity", index + 1, len(rounded))
    return losses


def _dequantised(quantised: Int8Weight, weight: Tensor) -> Tensor:
    return quantised.dequantize().reshape(weight.shape)


def median(losses: dict[fx.Node, float]) -> float:
    ordered = sorted(losses.values())
    return max(ordered[len(ordered) // 2], 1e-12) if ordered else 1e-12


def stand_out(losses: dict[fx.Node, float], macs: dict[fx.Node, int]) -> list[fx.Node]:
    """The layers to leave in float: far above the usual loss, and within the budget of multiply-adds."""
    usual = median(losses)
    total, spent, kept = sum(macs.values()), 0, []
    for node in sorted(losses, key=losses.__getitem__, reverse=True):
        if losses[node] < STANDS_OUT * usual:
            break
        if spent + macs.get(node, 0) <= FLOAT_BUDGET * total:
            kept.append(node)
            spent += macs.get(node, 0)
    return kept


# --- rewriting ------------------------------------------------------------------------------------


def quantize_cnn(
    graph: Graph,
    batches: Sequence[tuple[Tensor, ...]],
    keep_float: set[str],
    progress: Callable[[str, int, int], Any] | None = None,
    edges: dict[fx.Node, Edge] | None = None,
) -> list[Decision]:
    """Every convolution that does not stand out becomes conv2d_int8. In place.

    edges: what :func:`observe_edges` saw in this graph; then ``keep_float`` alone says what stays in float.
    """
    absorb_padding(graph)
    rounded = {
        node: int8_rows(graph.weight(Layer(node)["weight"])) for node in graph.calls(ops.conv2d.default)
    }
    losses: dict[fx.Node, float] = {}
    if edges is None:
        edges = observe_edges(graph, batches, progress)
        losses = sensitivity(graph, tuple(x[:8] for x in batches[0]), rounded, progress)
    in_float = set(stand_out(losses, weight_macs(graph, batches))) if losses else set()
    usual = median(losses)
    decisions, rewritten = [], {}
    for node in list(graph.calls(ops.conv2d.default)):
        name = layer_name(Layer(node))
        if name in keep_float or node in in_float:
            why = "asked for" if name in keep_float else f"{losses[node] / usual:.0f} times the median loss"
            decisions.append(Decision(name, "conv2d", "float32", why=why))
            in_float.add(node)
    quantisers = {node: edge.quantiser() for node, edge in edges.items()}
    quantised_of: dict[fx.Node, fx.Node] = {}  # float edge -> its uint8 form

    def as_uint8(source: fx.Node, before: fx.Node) -> fx.Node:
        if source not in quantised_of:
            scale, zero = quantisers[source]
            arguments = (source, scale, zero, torch.uint8)
            made = graph.add_call(ops.quantize_int8_static.default, arguments, like=before)
            quantised_of[source] = made
            # Right behind its source: a later reader may come before this one in program order.
            if source.op != "placeholder":
                source.append(made)
        return quantised_of[source]

    for node in list(graph.calls(ops.conv2d.default)):
        if node in in_float:
            continue
        layer = Layer(node)
        x_scale, x_zero = quantisers[layer["x"]]
        x = as_uint8(layer["x"], node)
        residual, residual_scale, residual_zero = layer["residual"], 1.0, 0
        if residual is not None and residual in quantisers:
            residual_scale, residual_zero = quantisers[residual]
            residual = as_uint8(residual, node)
        weight = graph.weight(layer["weight"])
        edge = edges[layer["x"]]
        quantised = rounded[node]
        restored = _dequantised(quantised, weight)
        bias = torch.zeros(weight.shape[0]) if layer["bias"] is None else graph.weight(layer["bias"]).float()
        correction = _expected(weight.float() - restored, edge.mean, layer["groups"])
        name = layer_name(layer)
        out_scale, out_zero = quantisers[node]
        arguments = (
            x, x_scale, x_zero,
            graph.add_weight(f"{name}.q", quantised.q.reshape(weight.shape), before=node),
            graph.add_weight(f"{name}.scale", quantised.scale, before=node),
            graph.add_weight(f"{name}.bias_corrected", bias + correction, before=node),
            list(layer["stride"]), list(layer["padding"]), list(layer["dilation"]), layer["groups"],
            layer["activation"], residual, residual_scale, residual_zero, layer["post_activation"],
            out_scale, out_zero, torch.uint8,
        )  # fmt: skip
        made = graph.add_call(ops.conv2d_int8.default, arguments, like=node)
        made.meta["val"] = node.meta["val"]
        rewritten[node] = made
        quantised_of[node] = made
        decisions.append(Decision(name, "conv2d_int8", "int8", sqnr_db=sqnr_db(weight.float(), restored)))

    # Later layers first: a float layer that is about to go needs no float input.
    for node, made in reversed(rewritten.items()):
        _serve_float_users(graph, node, made, quantisers[node])
    graph.clean()
    return decisions


def _expected(difference: Tensor, mean: Tensor, groups: int) -> Tensor:
    """sum over taps and channels of (w - w_hat) * E[x]: what rounding the weights takes from a channel's mean."""
    out, depth = difference.shape[:2]
    per_tap = difference.sum((2, 3))  # [O, C / groups]
    means = mean.reshape(groups, 1, depth).expand(groups, out // groups, depth).reshape(out, depth)
    return (per_tap * means).sum(1)


def _serve_float_users(graph: Graph, node: fx.Node, made: fx.Node, quantiser: tuple[float, int]) -> None:
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
