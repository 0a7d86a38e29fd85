"""How long a compression would take, from rates measured here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer

from .adaround import BATCH, STEPS
from .channels import Channels
from .cnn import EDGE_TRIALS, JUDGED, SEARCHED, can_have_4_bits
from .forms import FORMS, items_of
from .gptq import INT4, round_weight
from .prune import JUDGED_BATCHES, LEVELS, MULTIPLE, cuttable
from .ranges import METHODS
from .weights import int8_rows

ops = torch.ops.narrowcast

#: Plans that a search makes and measures, as a rule.
PLANS = 5


def seconds_of(graph: Graph, kind: str, recipe: str, data: Any, bytes_plan: int, run: float) -> float:
    """From rates measured here: ``run`` seconds for the float graph, GPTQ on one layer, a search of scales."""
    if not data.calibration:
        return 0.0
    weights = [graph.weights[Layer(n)["weight"].target] for n in graph.calls(ops.linear.default)]
    weights = [w for w in weights if w.dim() == 2 and w.shape[1] % 32 == 0]
    few = min(len(data.calibration), 8) if kind == "decoder" else len(data.calibration)
    total = (
        0.6 * run * 2 * len(data.held_out) + bytes_plan / 4e8
    )  # float and plan on the held-out part; packing
    if kind == "image" and recipe in ("int8", "int4"):
        total += _convolution_seconds(graph, recipe, data, run)
    if recipe in ("int8", "int8-weight"):
        total += run * few + _search_rate() * sum(w.numel() for w in graph.weights.values())
    if recipe in ("int4", "auto") and weights and kind != "image":
        per = _gptq_rate(weights)
        total += 2 * run * len(data.calibration) + per * sum(w.shape[0] * w.shape[1] ** 2 for w in weights)
    if recipe == "auto":
        total += run * few + PLANS * (0.6 * run * len(data.selection) + bytes_plan / 4e8)
        forms = [len([f for f in item.forms if not f.exact]) for item in items_of(graph, FORMS)]
        rows = 160 / 512 if kind == "decoder" else 1
        total += sum(forms) * run * rows / 2
    return total


def _convolution_seconds(graph: Graph, recipe: str, data: Any, run: float) -> float:
    """What :func:`.cnn.quantize_cnn` takes beside statistics of dense layers; ``run``: of the largest batch."""
    rows = max(batch[0].shape[0] for batch in (*data.calibration, *data.held_out))
    picture, pictures = run / rows, sum(batch[0].shape[0] for batch in data.calibration)
    weights = [
        (graph.weights[Layer(n)["weight"].target].flatten(1), can_have_4_bits(graph, n))
        for n in graph.calls(ops.conv2d.default)
    ]
    # Ranges of channels and edges, and two graphs that go layer by layer through all pictures.
    total = picture * pictures * 4
    searched = min(SEARCHED, pictures)
    # Equalisation looks five times, each rule of ranges once, each edge's trial at int8's speed.
    total += picture * searched * (5 + len(METHODS) + 1 + 0.5 * EDGE_TRIALS)
    scans = len(weights) + (sum(narrow for _, narrow in weights) if recipe == "int4" else 0)
    total += picture * min(JUDGED, pictures) * scans
    if weights:
        per = _gptq_rate([w for w, _ in weights])
        total += per * sum(w.shape[0] * w.shape[1] ** 2 for w, _ in weights)
    if recipe == "int4":
        total += _adaround_rate() * sum(w.numel() for w, narrow in weights if narrow)
    return total


def pruning_seconds(graph: Graph, data: Any, run: float) -> float:
    """Moments and fits go through all batches; channels are put in order by updates of an inverse; sizes are tried."""
    spaces = cuttable(Channels(graph), MULTIPLE)
    batches = len(data.calibration)
    elements = 0
    for space in spaces:
        for node, _ in space.readers:
            n, k = graph.weights[Layer(node)["weight"].target].flatten(1).shape
            elements += space.size * (n * k + k * k)
    x = torch.randn(256, 256, dtype=torch.float64)
    began = time.perf_counter()
    for _ in range(4):
        x = x - x[:, :1] @ x[:1]
    rate = (time.perf_counter() - began) / 4 / x.numel()
    return (
        3 * batches * run + len(spaces) * len(LEVELS) * min(JUDGED_BATCHES, batches) * run + rate * elements
    )


def _adaround_rate() -> float:
    """Seconds per weight that is learnt."""
    w, x = torch.randn(64, 128, requires_grad=True), torch.randn(BATCH, 128)
    began = time.perf_counter()
    with torch.enable_grad():
        for _ in range(4):
            up = torch.sigmoid(w)
            loss = (x @ up.t()).square().mean() + (1 - (2 * up - 1).abs().pow(3.0)).mean()
            loss.backward()
    return (time.perf_counter() - began) / 4 * STEPS / w.numel()


def _search_rate() -> float:
    """Seconds per weight."""
    weight = torch.randn(256, 1024)
    began = time.perf_counter()
    int8_rows(weight)
    return (time.perf_counter() - began) / weight.numel()


def _gptq_rate(weights: Sequence[Tensor]) -> float:
    """Seconds per N * K^2, measured on a layer of a middling depth."""
    k = sorted(w.shape[1] for w in weights)[len(weights) // 2]
    n = min(256, max(w.shape[0] for w in weights))
    weight, x = torch.randn(n, k), torch.randn(2 * k, k)
    hessian = x.t() @ x / (2 * k)
    began = time.perf_counter()
    round_weight(weight, hessian, INT4, 32)
    return (time.perf_counter() - began) / (n * k * k)
