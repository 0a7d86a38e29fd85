"""What a form of a layer costs: bytes in the plan, or milliseconds of this machine's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer
from narrowcast.runtime.executor import Executor

from .calibrate import Statistics
from .forms import Draft, Form, Item, Known
from .gptq import INT4, Rounded
from .ranges import Edge

ops = torch.ops.narrowcast

OBJECTIVES = ("bytes", "latency")
#: Rows of a layer's input that are timed, by the kind of model: a generated token and a prompt; a short text and a
#: batch of long ones; a picture.
ROWS = {"decoder": (1, 256), "encoder": (32, 1024), "image": (1,)}
REPEATS, WARMUP = 15, 3
#: A form must take less than this share of float32's time to count as faster.
FASTER = 0.97


def weight_bytes(known: Known, items: Sequence[Item]) -> dict[str, dict[str, float]]:
    return {
        item.name: {f.name: float(f.weight_bytes(known.graph, item)) for f in item.forms} for item in items
    }


def latency(
    kind: str, known: Known, items: Sequence[Item], progress: Any = None
) -> dict[str, dict[str, dict]]:
    """Layer -> form -> case -> milliseconds, measured by an executor that runs the layer alone.

    Layers of the same op, sizes and options are measured once. Tables have no times: a gather costs next to
    nothing, and unpacking makes it slower.
    """
    known_times: dict[tuple, dict[str, dict[str, float]]] = {}
    result = {}
    for index, item in enumerate(items):
        if item.kind != "table":
            key = _signature(known.graph, item)
            if key not in known_times:
                known_times[key] = {form.name: _measured(kind, known, item, form) for form in item.forms}
            result[item.name] = known_times[key]
        if progress is not None:
            progress("timing", index + 1, len(items))
    return result


def shares(times: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
    """One number per form: the mean over cases of its share of what all layers take in float32."""
    whole: dict[str, float] = {}
    for forms in times.values():
        for case, ms in forms["float32"].items():
            whole[case] = whole.get(case, 0.0) + ms
    return {
        layer: {
            form: sum(ms / whole[case] for case, ms in cases.items()) / len(cases)
            for form, cases in forms.items()
        }
        for layer, forms in times.items()
    }


def slower(item: Item, cost: dict[str, float]) -> list[Form]:
    """The forms that are not faster than float32 here."""
    return [f for f in item.forms[1:] if cost[f.name] > FASTER * cost["float32"]]


def _signature(graph: Graph, item: Item) -> tuple:
    layer = Layer(item.nodes[0])
    shape = item.nodes[0].meta["val"].shape[2:] if item.kind == "conv" else ()
    options = [
        layer.values.get(n)
        for n in ("stride", "padding", "dilation", "groups", "activation", "post_activation")
    ]
    own = graph.native.get(item.weight)
    parts = (
        layer["bias"] is None,
        layer["residual"] is None,
        type(own).__name__,
        str(getattr(own, "bits", "")),
    )
    return (item.kind, tuple(graph.weights[item.weight].shape), str(options), str(tuple(shape)), *parts)


def _measured(kind: str, known: Known, item: Item, form: Form) -> dict[str, float]:
    alone, x, residual = _alone(known, item)
    draft = Draft.begin(alone)
    node = draft.of[alone.graph.fx.find_nodes(op="call_function", target=item.nodes[0].target)[0]]
    copy = Item(item.name, "dense" if item.kind == "tied" else item.kind, item.weight, [], [])
    copy.nodes = [next(old for old, new in draft.of.items() if new is node)]
    form.apply(draft, [copy])
    draft.graph.clean()
    executor = Executor(draft.graph, device="cpu")
    result = {}
    for rows in ROWS[kind]:
        inputs = [t.repeat(rows, *[1] * (t.dim() - 1)) for t in (x, residual) if t is not None]
        profile = executor.profile(*inputs, repeats=REPEATS, warmup=WARMUP)
        # Between convolutions edges are int8: what quantises this one's input is the work of the layer before.
        ours = [row for row in profile.rows if item.kind != "conv" or row.op.startswith("conv2d")]
        result[f"{rows}"] = sum(row.ms for row in ours)
    return result


def _alone(known: Known, item: Item) -> tuple[Known, Tensor, Tensor | None]:
    """A graph that holds the layer alone, and one row of input and residual for it."""
    original, weights = item.nodes[0], known.graph.weights
    layer, nodes = Layer(original), fx.Graph()
    dense = item.kind != "conv"
    shape = (weights[item.weight].shape[1],) if dense else tuple(layer["x"].meta["val"].shape[1:])
    x = torch.randn(1, *(int(n) for n in shape))
    of: dict[Any, fx.Node] = {layer["x"]: nodes.placeholder("x")}
    residual = None
    if layer["residual"] is not None:
        sizes = original.meta["val"].shape[-1:] if dense else original.meta["val"].shape[1:]
        residual = torch.randn(1, *(int(n) for n in sizes))
        if layer["residual"] not in of:
            of[layer["residual"]] = nodes.placeholder("residual")
        else:
            residual = None
    kept = {}
    for part in ("weight", "bias"):
        if isinstance(layer[part], fx.Node):
            of[layer[part]] = nodes.get_attr(layer[part].target)
            kept[layer[part].target] = weights[layer[part].target]
    node = nodes.node_copy(original, of.__getitem__)
    node.meta = {
        "val": torch.empty(
            1, *original.meta["val"].shape[-1:] if dense else original.meta["val"].shape[1:], device="meta"
        )
    }
    nodes.output((node,))
    native = {item.weight: known.graph.native[item.weight]} if item.weight in known.graph.native else {}
    graph = Graph(nodes, kept, native)
    edge, out = Edge(), Edge()
    if not dense:
        generator = torch.Generator().manual_seed(0)
        edge.add(x, generator)
        out.add(graph.run(*(t for t in (x, residual) if t is not None))[0], generator)
    ranges = {of[layer["x"]]: edge.quantiser(), node: out.quantiser()} if not dense else {}
    if layer["residual"] is not None and not dense:
        ranges[of[layer["residual"]]] = out.quantiser()
    images = [] if dense else [tuple(t for t in (x, residual) if t is not None)]
    made = Known(graph, {node: Statistics()}, ranges, images)
    if dense:  # codes that are quick to make: the time does not depend on them
        n, k = weights[item.weight].shape
        made.rounded[item.name] = _zeros(n, k)
    return made, x, residual


def _zeros(n: int, k: int, group: int = 32) -> Rounded:
    if k % group:
        group = k
    groups = k // group
    return Rounded(
        INT4, group, torch.zeros(n, k, dtype=torch.int8), torch.ones(n, groups), torch.zeros(n, groups)
    )
