"""Layers rounded one after the other, each for the inputs that the layers before it, already rounded, hand it.

The graph runs once, node by node, with all calibration batches side by side: at a dense layer its inputs are
there for every batch, the weight is rounded for them, and what the rounded layer makes of them goes on. The
float graph runs beside it, and its outputs are the aim: a layer makes up, as far as it can, for what those
before it lost, its residual included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.formats import Int8Weight
from narrowcast.graph import Graph
from narrowcast.graph.ir import last_uses
from narrowcast.graph.passes.match import Layer

from .gptq import Grid, Rounded, round_weight
from .work_folder import WorkFolder

ops = torch.ops.narrowcast

#: A layer makes up for those before it only with this many rows of calibration data per input, or it would learn
#: the data by heart; and with this much added to the diagonal of the Hessian, relative to its mean, for tokens of a
#: text are much alike. With 0.01 in its place MiniLM W8A8 has a 1 - cosine of 0.00064 on a novel like the one
#: calibrated on and 0.0017 on code, with 1 0.00037 and 0.0007; SmolLM2 int4 in groups of 32 a KL of 0.049 and 0.036.
ROWS_PER_INPUT, RIDGE = 4, 1.0
#: Rounding to 4 and to 8 bits believes this share of the moments between different inputs. MiniLM int4 in groups of
#: 64, 1 - cosine with 1, 0.9, 0.7 and 0.5: English 0.0070, 0.0069, 0.0069, 0.0071; code 0.0203, 0.0188, 0.0174, 0.0174;
#: Spanish 0.0134, 0.0114, 0.0117, 0.0123; SQL 0.0167, 0.0160, 0.0148, 0.0149. W8A8, the largest of 184 English
#: texts and the mean of code, with 1, 0.85 and 0.7: 0.00092, 0.00071, 0.00104; 0.00050, 0.00044, 0.00040.
TRUST, TRUST_INT8 = 0.7, 0.85

Valid = Callable[[tuple[Tensor, ...]], Tensor | None]


@dataclass(frozen=True)
class Target:
    """How a layer is to be rounded."""

    name: str
    grid: Grid
    group_size: int
    activation_bits: int
    activation_group: int | None = None  #: of linear_dynamic_int8 (0: per token); None: weights in groups


class Batches:
    """The values of a graph's nodes for every batch; kept from where they are made to their last use."""

    def __init__(self, graph: Graph, inputs: Sequence[tuple[Tensor, ...]]):
        self.graph, self.inputs = graph, inputs
        self.position = {node: index for index, node in enumerate(graph.inputs)}
        self.values: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        self.last = last_uses(graph.fx)

    def of(self, node: fx.Node, index: int) -> Any:
        if node.op == "get_attr":
            return self.graph.weights[node.target]
        values = self.values[index]
        if node.op == "placeholder" and node not in values:
            # A copy, made late: caches are written to, and each lives for one layer only.
            values[node] = self.inputs[index][self.position[node]].clone()
        return values[node]

    def arguments(self, node: fx.Node, index: int) -> tuple[tuple, dict]:
        value = lambda n: self.of(n, index)  # noqa: E731
        return fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)

    def run(self, node: fx.Node) -> None:
        for index, values in enumerate(self.values):
            args, kwargs = self.arguments(node, index)
            values[node] = node.target(*args, **kwargs)

    def forget(self, node: fx.Node) -> None:
        """Drops what ``node`` was the last to use."""
        for dead in self.last.get(node, ()):
            for values in self.values:
                values.pop(dead, None)


@torch.no_grad()
def round_in_sequence(
    graph: Graph,
    targets: dict[fx.Node, Target],
    inputs: Sequence[tuple[Tensor, ...]],
    valid: Valid = lambda inputs: None,
    progress: Callable[[str, int, int], Any] | None = None,
    work: WorkFolder | None = None,
) -> dict[fx.Node, Rounded]:
    """Rounds the weights of ``targets``, which are calls of ``narrowcast.linear``; changes nothing.

    valid(inputs): a boolean tensor [B, S] of rows that count (padding does not), or None. work: where finished
    layers are kept, and taken from when a run was cut short.
    """
    masks = [valid(batch) for batch in inputs]
    batches, aims = Batches(graph, inputs), Batches(graph, inputs)
    rounded: dict[fx.Node, Rounded] = {}
    for node in graph.fx.nodes:
        if len(rounded) == len(targets) or node.op == "output":
            break
        if node.op != "call_function":
            continue
        target = targets.get(node)
        if target is None or len(rounded) + 1 < len(targets):
            aims.run(node)
        if target is None:
            batches.run(node)
        else:
            result = work.load(len(rounded), target) if work is not None else None
            if result is None:
                result = _round(node, target, batches, aims, masks)
                if work is not None:
                    work.save(len(rounded), target, result)
            rounded[node] = result
            if len(rounded) < len(targets):
                _run_rounded(node, result, target, batches)
            if progress is not None:
                progress("rounding", len(rounded), len(targets))
        batches.forget(node)
        aims.forget(node)
    return rounded


def _as_multiplied(x: Tensor, target: Target) -> Tensor:
    """Rows [R, K] as the layer multiplies them."""
    block = target.activation_group
    if block is None:
        if target.activation_bits == 16:
            return x.float()
        block = math.gcd(target.group_size, 128)  # inputs of linear_grouped that share a scale
    q, scale = ops.quantize_int8(x, block)
    return ops.dequantize_int8(q, scale, None, block)


def _round(
    node: fx.Node, target: Target, batches: Batches, aims: Batches, masks: list[Tensor | None]
) -> Rounded:
    layer = Layer(node)
    weight = batches.graph.weight(layer["weight"]).float()
    n, k = weight.shape
    # Where nothing stands between product and residual, the product can make up for the residual as well.
    residual = layer["residual"] if layer["activation"] == "none" else None
    hessian = torch.zeros(k, k)
    missing = torch.zeros(k if residual is None else n, k)  # E[(aim - input) input^T], or of the outputs
    rows, left_out = 0, 0
    for index, mask in enumerate(masks):
        x, aim = (_rows(b.of(layer["x"], index), mask) for b in (batches, aims))
        finite = x.isfinite().all(1) & aim.isfinite().all(1)
        if not finite.all():
            left_out += int((~finite).sum())
            x, aim = x[finite], aim[finite]
        x = _as_multiplied(x, target)
        lost = aim - x
        if residual is not None:
            ours, theirs = (_rows(b.of(residual, index), mask)[finite] for b in (batches, aims))
            lost = torch.addmm(theirs.float() - ours, lost, weight.t())
        hessian.addmm_(x.t(), x)
        missing.addmm_(lost.t(), x)
        rows += x.shape[0]
    usable = rows > 0 and bool(hessian.diagonal().any())
    if usable:
        hessian /= rows
    if usable and rows >= ROWS_PER_INPUT * k:
        missing /= rows
        weight = weight + made_up(hessian, missing if residual is not None else weight @ missing)
    trust = TRUST if target.grid.high - target.grid.low < 32 else TRUST_INT8
    result = round_weight(weight, hessian if usable else None, target.grid, target.group_size, trust)
    if left_out:
        result.notes.append(f"{left_out} of its input rows were not finite and were left out")
    return result


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [R, K] of [.., K] that count."""
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask]
    return x.reshape(-1, x.shape[-1])


def made_up(hessian: Tensor, missing: Tensor, ridge: float = RIDGE) -> Tensor:
    """The change of a weight [N, K] that brings its outputs closest to their aim: missing (H + ridge * mean)^-1."""
    damped = hessian.double()
    damped.diagonal().add_(ridge * damped.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return torch.zeros_like(missing)
    return torch.cholesky_solve(missing.double().t(), factor).t().float()


def _run_rounded(node: fx.Node, result: Rounded, target: Target, batches: Batches) -> None:
    layer = Layer(node)
    weight = result.weight() if target.activation_group is None else result.rows()
    for index, values in enumerate(batches.values):
        of = lambda part: batches.of(part, index) if isinstance(part, fx.Node) else part  # noqa: B023, E731
        x, bias, residual = of(layer["x"]), of(layer["bias"]), of(layer["residual"])
        activation, after, dtype = layer["activation"], layer["post_activation"], layer["out_dtype"]
        if isinstance(weight, Int8Weight):
            values[node] = ops.linear_dynamic_int8(
                x, weight.q, weight.scale, bias, activation, residual, dtype,
                group_size=target.activation_group, post_activation=after,
            )  # fmt: skip
            continue
        values[node] = ops.linear_grouped(
            x, weight.packed, weight.scale, weight.offset, weight.group_size, weight.bits, bias, activation,
            residual, dtype, activation_bits=target.activation_bits, post_activation=after,
        )  # fmt: skip
