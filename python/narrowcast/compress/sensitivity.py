"""What each form of each layer does to the outputs of the model, that layer changed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer, calls

from .calibrate import decoder_inputs
from .forms import Form, Item, Known
from .replay import Replay

aten = torch.ops.aten
ops = torch.ops.narrowcast

Progress = Callable[[str, int, int], Any]

#: What is looked at: tokens of a window, texts and pictures of calibration data.
TOKENS, BATCHES = 160, {"decoder": 1, "encoder": 2, "image": 1}
#: Multiply-adds of a scan, above which only the coarsest form of a dense layer is replayed; the others follow from
#: it by the error of the layer's own outputs, for small errors a divergence grows with their square.
MOST_MACS = 1e12


def divergence(kind: str, reference: Tensor, ours: Tensor) -> float:
    """Mean over positions, texts or pictures: KL(reference || ours) of logits, or 1 - cosine of embeddings."""
    a, b = (x.double().reshape(-1, x.shape[-1]) for x in (reference, ours))
    if kind == "encoder":
        return (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean().item()
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def sample(kind: str, graph: Graph, batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The part of the calibration data that a scan looks at."""
    few = list(batches[: BATCHES.get(kind, 1)])
    if kind == "decoder":
        return [decoder_inputs(graph, inputs[0][:, :TOKENS]) for inputs in few]
    return few


def scan(
    kind: str,
    known: Known,
    items: Sequence[Item],
    batches: Sequence[tuple[Tensor, ...]],
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Layer -> form -> divergence of the model's outputs. Forms that are exact have 0."""
    replays = [Replay(known.graph, inputs) for inputs in sample(kind, known.graph, batches)]
    lossy = [form for item in items for form in item.forms if not form.exact]
    scaled = _macs(known.graph, batches[0]) * len(lossy) / 2 > MOST_MACS if lossy else False
    losses: dict[str, dict[str, float]] = {}
    for index, item in enumerate(items):
        result = {form.name: 0.0 for form in item.forms}
        local = {f.name: e for f in item.forms if (e := _local(known, item, f)) is not None} if scaled else {}
        coarsest = max(local, key=local.__getitem__, default=None)
        for form in item.forms:
            if not form.exact and (form.name == coarsest or form.name not in local):
                result[form.name] = _replayed(kind, replays, known, item, form)
        for name, error in local.items():
            if name != coarsest and coarsest is not None:
                result[name] = result[coarsest] * error / max(local[coarsest], 1e-30)
        losses[item.name] = result
        if progress is not None:
            progress("sensitivity", index + 1, len(items))
    return losses


def _replayed(kind: str, replays: list[Replay], known: Known, item: Item, form: Form) -> float:
    weight, seen = form.stand_in(known, item)
    bias = form.bias(known, item)

    def change(node: fx.Node) -> Callable[[tuple, dict], Any]:
        def call(args: tuple, kwargs: dict) -> Any:
            if calls(node, aten.embedding.default):
                return node.target(weight, *args[1:], **kwargs)
            x = args[0] if seen is None else seen(args[0])
            if bias is not None:
                args, kwargs = (*args[:2], bias, *args[3:]), {k: v for k, v in kwargs.items() if k != "bias"}
            return node.target(x, weight.to(args[1].dtype), *args[2:], **kwargs)

        return call

    changes = {node: change(node) for node in item.nodes}
    if item.kind == "tied":  # the table's rows change as well
        for node in known.graph.calls(aten.embedding.default):
            if node.args[0].target == item.weight:
                changes[node] = change(node)
    parts = [divergence(kind, r.outputs[0], r.run(changes)[0]) for r in replays]
    return max(sum(parts) / len(parts), 0.0)


def _local(known: Known, item: Item, form: Form) -> float | None:
    """Error energy of a dense layer's own outputs on calibration data, relative; None where it is not known."""
    found = known.statistics.get(item.nodes[0])
    if item.kind != "dense" or form.exact or found is None or not found.rows:
        return None
    weight, seen = form.stand_in(known, item)
    x = found.sample
    reference = x @ known.graph.weights[item.weight].float().t()
    ours = (x if seen is None else seen(x)) @ weight.float().t()
    return ((ours - reference).square().sum() / reference.square().sum().clamp(min=1e-30)).item()


def _macs(graph: Graph, inputs: tuple[Tensor, ...]) -> float:
    """Multiply-adds with weights, for as much as a scan looks at."""
    rows = inputs[0].numel() if inputs[0].dim() == 2 else inputs[0].shape[0]
    total = 0.0
    for node in graph.calls(ops.linear.default):
        total += graph.weights[Layer(node)["weight"].target].numel() * min(rows, 4 * TOKENS)
    for node in graph.calls(ops.conv2d.default):
        shape = node.meta["val"].shape
        weight = graph.weights[Layer(node)["weight"].target]
        total += weight.numel() * rows * int(shape[2]) * int(shape[3])
    return total
