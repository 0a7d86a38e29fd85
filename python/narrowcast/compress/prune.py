"""Structured pruning: whole channels go, together with everything that makes, carries or reads them.

How many a space keeps is chosen by what its loss does to the model's output, for the multiply-adds that it saves;
which ones go, by how well the layers that read them can do without: one at a time, the one whose absence costs the
least after the others have taken over what they can of it (the optimal brain surgeon's step for a group of columns,
Hassibi and Stork, 1993). Then every reader is fitted by least squares to what it made of all channels, for the
inputs that the pruned layers before it hand it. Sizes are multiples of 16, which kernels like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer, calls

from .adaround import places, rows_wanted, unfold
from .channels import Channels, Space
from .ranges import output_error
from .sequential import Batches, made_up
from .simulation import float_outputs
from .transformer import layer_name

ops = torch.ops.narrowcast

MULTIPLE = 16
#: Parts of its channels that a space may be cut down to.
LEVELS = (0.75, 0.5, 0.375, 0.25, 0.125)
#: Added to the diagonal of second moments, relative to its mean.
RIDGE = 1e-3
#: Batches that the choice of sizes is judged on.
JUDGED_BATCHES = 4

Progress = Callable[[str, int, int], Any] | None
Inputs = Sequence[tuple[Tensor, ...]]


@dataclass
class Cut:
    """A space on its way: the order in which its channels go, what keeping fewer costs, and how many stay."""

    space: Space
    order: Tensor  #: channels, the first to go first
    errors: dict[int, float] = field(default_factory=dict)  #: channels kept -> output error
    kept: int = 0

    @property
    def stay(self) -> Tensor:
        """Indices of the channels that stay, ascending."""
        return self.order[self.space.size - self.kept :].sort().values

    @property
    def names(self) -> list[str]:
        return [layer_name(Layer(node)) for node, _ in self.space.producers]


@torch.no_grad()
def prune_graph(
    graph: Graph, inputs: Inputs, share: float, multiple: int = MULTIPLE, progress: Progress = None
) -> dict[str, Any]:
    """Cuts channels of convolutions and columns of dense layers until ``share`` of the multiply-adds is gone.

    In place, for a float graph. inputs: calibration batches. Returns a report: "share", "macs_before",
    "macs_after" (of layers with weights, for the first batch), "spaces" (layers, channels, kept), "left" (layers
    whose channels cannot be cut, and why).

    Raises ArgumentError for a share outside (0, 1) or no data, UnsupportedError when so much cannot be cut.
    """
    check(share, inputs)
    channels = Channels(graph)
    found = cuttable(channels, multiple)
    cost = Cost(graph, channels, inputs[0])
    moments = _moments(graph, {node for s in found for node, _ in s.readers}, inputs)
    cuts = []
    for index, space in enumerate(found):
        cuts.append(_order(graph, space, moments))
        if progress is not None:
            progress("ordering channels", index + 1, len(found))
    _measure(graph, cuts, moments, inputs[:JUDGED_BATCHES], multiple, progress)
    before = cost.total(cuts)
    choose(cuts, cost, share)
    after = cost.total(cuts)
    changed = [cut for cut in cuts if cut.kept < cut.space.size]
    _reconstruct(graph, changed, moments, inputs, progress)
    for cut in changed:
        apply_cut(graph, channels, cut)
    graph.clean()
    left = [
        {"name": layer_name(Layer(node)), "why": s.why or "few channels, or nothing reads them"}
        for s in channels.spaces
        if s not in found
        for node, _ in s.producers
    ]
    spaces = [{"layers": c.names, "channels": c.space.size, "kept": c.kept} for c in cuts]
    return {
        "share": 1 - after / before,
        "macs_before": before,
        "macs_after": after,
        "spaces": spaces,
        "left": left,
    }


def check(share: float, inputs: Inputs) -> None:
    if not 0 < share < 1:
        raise ArgumentError(f"prune must lie between 0 and 1 (0.5 is half of the multiply-adds), got {share}")
    if not inputs:
        raise ArgumentError("data must be given: pruning looks at what channels carry")


def cuttable(channels: Channels, multiple: int) -> list[Space]:
    return [s for s in channels.spaces if s.producers and s.readers and not s.why and s.size > multiple]


def sizes(size: int, multiple: int) -> list[int]:
    """What a space of ``size`` channels may be cut down to, the largest first."""
    sizes = {max(multiple, round(size * level / multiple) * multiple) for level in LEVELS}
    return sorted((kept for kept in sizes if kept < size), reverse=True)


# --- cost -----------------------------------------------------------------------------------------


class Cost:
    """Multiply-adds and weights of all layers with weights, as functions of what the spaces keep."""

    def __init__(self, graph: Graph, channels: Channels, inputs: tuple[Tensor, ...]):
        self.layers: list[tuple[int, int, Space | None, Space | None]] = []  # macs, weights, read, made

        def observe(node, args, kwargs, output):
            if not calls(node, ops.conv2d.default, ops.linear.default):
                return
            per_output = args[1][0].numel()
            spaces = channels.of.get(Layer(node)["x"]), channels.of.get(node)
            windows = [channels.of[u] for u in node.users if u in channels.of and channels.of[u].slices]
            if windows:  # a merged layer: each window makes its own channels
                for window in windows:
                    part = output.numel() // output.shape[-1] * window.size
                    self.layers.append((part * per_output, window.size * per_output, spaces[0], window))
                return
            depthwise = spaces[1] is not None and node in spaces[1].depthwise
            read = None if depthwise else spaces[0]
            self.layers.append((output.numel() * per_output, args[1].numel(), read, spaces[1]))

        graph.run(*(x.clone() for x in inputs), observe=observe)

    def total(self, cuts: Sequence[Cut]) -> int:
        part = {cut.space: cut.kept / cut.space.size for cut in cuts}
        return round(sum(m * part.get(x, 1.0) * part.get(y, 1.0) for m, _, x, y in self.layers))

    def weights(self, cuts: Sequence[Cut]) -> int:
        part = {cut.space: cut.kept / cut.space.size for cut in cuts}
        return round(sum(w * part.get(x, 1.0) * part.get(y, 1.0) for _, w, x, y in self.layers))


def choose(cuts: Sequence[Cut], cost: Cost, share: float) -> None:
    """Steps to smaller sizes, always the one that costs least for what it saves."""
    before = total = cost.total(cuts)
    while total > (1 - share) * before:
        steps = []
        for cut in cuts:
            smaller = [k for k in cut.errors if k < cut.kept]
            for kept in smaller:
                was, cut.kept = cut.kept, kept
                saved = total - cost.total(cuts)
                cut.kept = was
                more = max(cut.errors[kept] - cut.errors[was], 0.0)
                steps.append((more / max(saved, 1), kept, cut))
        if not steps:
            raise UnsupportedError(
                f"prune must be at most {1 - total / before:.2f} for this model, got {share}: no more channels can go"
            )
        _, kept, cut = min(steps, key=lambda s: s[0])
        cut.kept = kept
        total = cost.total(cuts)
    # Steps are coarse: what is gone beyond the share comes back where it helps most.
    while True:
        back = []
        for cut in cuts:
            for kept in (k for k in cut.errors if k > cut.kept):
                was, cut.kept = cut.kept, kept
                if cost.total(cuts) <= (1 - share) * before:
                    back.append((cut.errors[was] - cut.errors[kept], kept, cut))
                cut.kept = was
        if not back:
            return
        _, kept, cut = max(back, key=lambda s: s[0])
        cut.kept = kept


# --- which channels go -----------------------------------------------------------------------------


def _inputs_of(batches: Batches, node: fx.Node, index: int, at=None) -> Tensor:
    """Rows [R, K] of what a layer multiplies its weight with; ``at``: pixels or rows, None for all."""
    layer = Layer(node)
    x = batches.of(layer["x"], index)
    if calls(node, ops.conv2d.default):
        weight = batches.graph.weight(layer["weight"])
        return unfold(x, layer, at, (weight.shape[2], weight.shape[3]))[0]
    return x.reshape(-1, x.shape[-1]).float()[at]


def _drawn(batches: Batches, node: fx.Node, index: int, wanted: int, generator: torch.Generator):
    output = batches.values[index][node]
    if calls(node, ops.conv2d.default):
        return places(output.shape, wanted, generator)
    return torch.randperm(output.numel() // output.shape[-1], generator=generator)[:wanted]


def _moments(graph: Graph, readers: set[fx.Node], inputs: Inputs) -> dict[fx.Node, Tensor]:
    """E[x x^T] of the unfolded inputs of every reader, about their mean (the bias takes that up)."""
    generator = torch.Generator().manual_seed(0)
    batches, moments = Batches(graph, inputs), {}
    for node in graph.fx.nodes:
        if node.op == "call_function":
            batches.run(node)
            if node in readers:
                wanted = -(-rows_wanted(graph.weight(Layer(node)["weight"]), 1) // len(inputs))
                drawn = [_drawn(batches, node, i, wanted, generator) for i in range(len(inputs))]
                x = torch.cat([_inputs_of(batches, node, i, at) for i, at in enumerate(drawn)])
                x = x - x.mean(0)
                moments[node] = x.t() @ x / x.shape[0]
        if node.op != "output":
            batches.forget(node)
    return moments


def _regular(moment: Tensor) -> Tensor:
    moment = moment.double().clone()
    diagonal = moment.diagonal()
    diagonal.add_(RIDGE * diagonal.mean().clamp(min=1e-12))
    return moment


def _flat(graph: Graph, node: fx.Node) -> Tensor:
    return graph.weight(Layer(node)["weight"]).double().flatten(1)


def _width(graph: Graph, node: fx.Node, columns: int) -> int:
    """Columns of the flattened weight that one channel owns."""
    weight = graph.weight(Layer(node)["weight"])
    return columns if weight.dim() == 2 else weight.shape[2] * weight.shape[3]


def _order(graph: Graph, space: Space, moments: dict[fx.Node, Tensor]) -> Cut:
    """Channels in the order in which they can best be missed, the readers fitted anew after each."""
    state = []
    for node, columns in space.readers:
        weight, moment = _flat(graph, node), _regular(moments[node])
        signal = ((weight @ moment) * weight).sum().clamp(min=1e-30)
        state.append([weight, torch.linalg.inv(moment), _width(graph, node, columns), signal])
    alive = torch.ones(space.size, dtype=torch.bool)
    order = []
    for _ in range(space.size - 1):
        scores = torch.zeros(space.size, dtype=torch.float64)
        for weight, inverse, width, signal in state:
            blocks = inverse.reshape(space.size, width, space.size, width).diagonal(dim1=0, dim2=2)
            blocks = blocks.permute(2, 0, 1) + 1e-12 * torch.eye(width, dtype=torch.float64)
            w = weight.reshape(weight.shape[0], space.size, width).transpose(0, 1)  # [C, N, T]
            solved = torch.linalg.solve(blocks, w.transpose(1, 2))  # [C, T, N]
            scores += (w.transpose(1, 2) * solved).sum((1, 2)) / signal
        gone = int(torch.where(alive, scores, float("inf")).argmin())
        for part in state:
            weight, inverse, width, _ = part
            own = slice(gone * width, (gone + 1) * width)
            factor = torch.linalg.solve(inverse[own, own], inverse[own])  # [T, K]
            part[0] = weight - weight[:, own] @ factor
            part[1] = inverse - inverse[:, own] @ factor
            # Its place stays, with an identity, so that later solves are well posed.
            part[1][own], part[1][:, own] = 0.0, 0.0
            part[1][own, own] = torch.eye(width, dtype=torch.float64)
            part[0][:, own] = 0.0
        alive[gone] = False
        order.append(gone)
    order.append(int(alive.nonzero()[0]))
    return Cut(space, torch.tensor(order), kept=space.size)


# --- how many go ----------------------------------------------------------------------------------


def _columns(stay: Tensor, width: int) -> Tensor:
    return (stay[:, None] * width + torch.arange(width)).flatten()


def _fitted(weight: Tensor, moment: Tensor, columns: Tensor) -> Tensor:
    """The weight with zeros but in ``columns``, and there what makes the same of them as far as can be."""
    moment = _regular(moment)
    cross = weight @ moment[:, columns]
    fitted = torch.zeros_like(weight)
    fitted[:, columns] = torch.linalg.solve(moment[columns][:, columns], cross.t()).t()
    return fitted


def _fit_readers(graph: Graph, cut: Cut, moments: dict[fx.Node, Tensor]) -> dict[str, Tensor]:
    """Weights of a space's readers without the channels that go, fitted to the data of the whole model."""
    weights = {}
    for node, columns in cut.space.readers:
        name = Layer(node)["weight"].target
        old = graph.weights[name]
        stay = _columns(cut.stay, _width(graph, node, columns))
        weights[name] = _fitted(_flat(graph, node), moments[node], stay).reshape(old.shape).to(old.dtype)
    return weights


def _measure(
    graph: Graph, cuts: list[Cut], moments, judged: Inputs, multiple: int, progress: Progress
) -> None:
    """The output error of every space at every size, the others whole.

    The bias is left alone: what a mean adds is small beside what a channel's change does.
    """
    reference = float_outputs(graph, list(judged))
    for index, cut in enumerate(cuts):
        size = cut.space.size
        cut.errors[size] = 0.0
        original = dict(graph.weights)
        for kept in sizes(size, multiple):
            cut.kept = kept
            graph.weights |= _fit_readers(graph, cut, moments)
            cut.errors[kept] = output_error(reference, float_outputs(graph, list(judged)))
            graph.weights.update(original)
        cut.kept = size
        if progress is not None:
            progress("measuring", index + 1, len(cuts))


# --- fitting and cutting ---------------------------------------------------------------------------


def _reconstruct(graph: Graph, cuts: list[Cut], moments, inputs: Inputs, progress: Progress) -> None:
    """Fits the readers, in order, to what the whole model makes there; channels that go become zeros first."""
    generator = torch.Generator().manual_seed(1)
    original = graph.clone()
    of = {node.name: node for node in original.fx.nodes}
    columns_of: dict[fx.Node, Tensor] = {}
    for cut in cuts:
        graph.weights |= _fit_readers(graph, cut, moments)
        for node, columns in cut.space.readers:
            columns_of[node] = _columns(cut.stay, _width(graph, node, columns))
    ours, theirs = Batches(graph, inputs), Batches(original, inputs)
    done = 0
    for node in graph.fx.nodes:
        if node.op == "call_function":
            theirs.run(of[node.name])
            if node in columns_of:
                _refit(graph, node, of[node.name], columns_of[node], ours, theirs, generator)
                done += 1
                if progress is not None:
                    progress("fitting", done, len(columns_of))
            ours.run(node)
        if node.op != "output":
            ours.forget(node)
            theirs.forget(of[node.name])


def _refit(graph: Graph, node: fx.Node, whole: fx.Node, columns: Tensor, ours, theirs, generator) -> None:
    layer, old = Layer(node), graph.weight(Layer(node)["weight"])
    wanted = -(-rows_wanted(old, 1) // len(ours.inputs))
    xs, aims = [], []
    for index in range(len(ours.inputs)):
        at = _drawn(theirs, whole, index, wanted, generator)
        xs.append(_inputs_of(ours, node, index, at))
        aims.append(_inputs_of(theirs, whole, index, at))
    target = torch.cat(aims) @ theirs.graph.weight(Layer(whole)["weight"]).float().flatten(1).t()
    x, weight = torch.cat(xs)[:, columns], old.float().flatten(1)[:, columns]
    x_mean, target_mean = x.mean(0), target.mean(0)
    lost = target - target_mean - (x - x_mean) @ weight.t()
    x = x - x_mean
    weight = weight + made_up(x.t() @ x / x.shape[0], lost.t() @ x / x.shape[0])
    fitted = torch.zeros_like(old.float().flatten(1))
    fitted[:, columns] = weight
    graph.weights[layer["weight"].target] = fitted.reshape(old.shape).to(old.dtype)
    shift = target_mean - weight @ x_mean
    if layer["bias"] is None:
        name = f"{layer_name(layer)}.bias"
        layer.set(bias=graph.add_weight(name, shift.to(old.dtype), before=node))
    else:
        name = layer["bias"].target
        graph.weights[name] = (graph.weights[name].float() + shift).to(graph.weights[name].dtype)


def apply_cut(graph: Graph, channels: Channels, cut: Cut) -> None:
    """Takes the rows, filters and columns of channels that go out of the weights, and fixes recorded shapes."""
    space, stay = cut.space, cut.stay
    # From the last window of a merged layer to the first: the places of those in front stay as they are.
    for node, first in sorted(space.producers, key=lambda p: -p[1]):
        layer, size = Layer(node), graph.weight(Layer(node)["weight"]).shape[0]
        rows = torch.cat((torch.arange(first), first + stay, torch.arange(first + space.size, size)))
        for part in ("weight", "bias"):
            if layer[part] is not None:
                graph.weights[layer[part].target] = graph.weights[layer[part].target][rows].contiguous()
        # Windows of a merged layer that lie behind move forward.
        for user in list(node.users):
            if calls(user, torch.ops.aten.slice.Tensor) and user.args[2] > first:
                move = space.size - cut.kept
                user.args = (*user.args[:2], user.args[2] - move, user.args[3] - move)
        for other in channels.spaces:
            other.producers = [
                (n, f - (space.size - cut.kept)) if n is node and f > first else (n, f)
                for n, f in other.producers
            ]
    for node in space.slices:
        node.args = (*node.args[:3], node.args[2] + cut.kept)
    for node in space.depthwise:
        layer = Layer(node)
        for part in ("weight", "bias"):
            if layer[part] is not None:
                graph.weights[layer[part].target] = graph.weights[layer[part].target][stay].contiguous()
        layer.set(groups=cut.kept)
    for node, columns in space.readers:
        name = Layer(node)["weight"].target
        weight = graph.weights[name]
        if weight.dim() == 4:
            graph.weights[name] = weight[:, stay].contiguous()
        else:
            graph.weights[name] = weight[:, _columns(stay, columns)].contiguous()
    for node in space.values:
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            axis = 1 if val.dim() == 4 else val.dim() - 1
            kept = cut.kept * channels.columns.get(node, 1)
            node.meta["val"] = val.narrow(axis, 0, min(kept, int(val.shape[axis])))
