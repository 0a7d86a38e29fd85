"""Short distillation: the weights of a changed float graph learn, by gradient descent on calibration data, to give
the outputs of the graph it came from (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from narrowcast.errors import UnsupportedError
from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer
from narrowcast.kernels.conv2d.conv2d_ref import evenly_padded

from .adaround import ACTIVATIONS
from .ranges import output_error
from .simulation import float_outputs

ops = torch.ops.narrowcast

#: Learning rate, falling to zero, and the share of the batches that only judges.
RATE, JUDGING = 2e-3, 0.2


def distill(
    graph: Graph,
    teacher: Graph,
    inputs: Sequence[tuple[Tensor, ...]],
    steps: int,
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[str, float | int | bool]:
    """Fits the weights of ``graph`` to the outputs of ``teacher``; keeps that when it helps on batches set aside.

    In place. One batch is one step. Returns "steps", "kept" and the output errors "before" and "after" on the
    batches set aside (the first fifth, at least one; all of them when there is only one).

    Raises UnsupportedError for a graph with a call that has no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(JUDGING * len(inputs)))
    judging, learning = list(inputs[:count]), list(inputs[count:]) or list(inputs)
    reference = float_outputs(teacher, judging)
    before = output_error(reference, float_outputs(graph, judging))
    aims = [teacher.run(*batch) for batch in learning]
    original = graph.weights
    learnt = {name: w.detach().clone().requires_grad_(w.is_floating_point()) for name, w in original.items()}
    optimiser = torch.optim.Adam([w for w in learnt.values() if w.requires_grad], lr=RATE)
    with torch.enable_grad():
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            index = int(torch.randint(len(learning), (1,), generator=generator))
            loss = _loss(aims[index], _run(graph, learnt, learning[index]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if progress is not None and (step + 1) % 10 == 0:
                progress("distilling", step + 1, steps)
    graph.weights = {name: w.detach() for name, w in learnt.items()}
    after = output_error(reference, float_outputs(graph, judging))
    kept = after < before
    if not kept:
        graph.weights = original
    return {"steps": steps, "kept": kept, "before": before, "after": after}


def _loss(aims: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Tensor:
    """Classes by their divergence and, like all other outputs, by their relative squared error."""
    total = torch.zeros(())
    for aim, output in zip(aims, outputs):
        if aim.is_floating_point():
            total = total + (output - aim).square().mean() / aim.square().mean().clamp(min=1e-12)
    if len(aims) == 1 and aims[0].dim() == 2 and aims[0].shape[1] > 1:
        p, q = aims[0].log_softmax(-1), outputs[0].log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum(-1).mean()
    return total


def _run(graph: Graph, weights: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs, by calls that have a gradient."""
    values: dict[fx.Node, Any] = dict(zip(graph.inputs, inputs))
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            values[node] = weights[node.target]
        elif node.op == "output":
            return tuple(values[x] for x in node.args[0])
        elif node.op == "call_function":
            values[node] = _call(node, values)
    raise AssertionError("a graph ends with its output node")


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.target in (ops.conv2d.default, ops.linear.default):
        layer = Layer(node)
        of = lambda part: values[layer[part]] if isinstance(layer[part], fx.Node) else None  # noqa: E731
        if node.target is ops.linear.default:
            y = F.linear(of("x"), of("weight"), of("bias"))
        else:
            x, padding = evenly_padded(of("x"), layer["padding"] or [0, 0])
            y = F.conv2d(
                x, of("weight"), of("bias"), layer["stride"] or 1, padding, layer["dilation"] or 1, layer["groups"] or 1,
            )  # fmt: skip
        y = ACTIVATIONS[layer["activation"] or "none"](y)
        residual = of("residual")
        return ACTIVATIONS[layer["post_activation"] or "none"](y if residual is None else y + residual)
    if getattr(node.target, "namespace", "") == "narrowcast":
        raise UnsupportedError(f"distill must be 0 for this model: {node.target} has no gradient")
    args, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
    return node.target(*args, **kwargs)
