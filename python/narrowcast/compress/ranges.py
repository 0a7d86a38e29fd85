"""Ranges of a CNN's static uint8 activations: candidates from what an edge looked like, chosen by what they do
to the model's output.

No rule is the best for every model, so each is tried on the whole model; then single edges try the ranges that
the other rules gave them. What counts is always the output on calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from narrowcast.graph import Graph
from narrowcast.graph.passes.match import Layer, calls

ops = torch.ops.narrowcast

#: Values of an edge kept to search its range on, and taken from one batch.
SAMPLE, FROM_BATCH = 1 << 17, 1 << 14
#: Candidate rules, the first wins a tie.
METHODS = ("mse", "min-max", "99.99 %", "99.9 %", "kl")
#: Clipped ranges that "mse" and "kl" try, as shares of the whole one.
_SHRINK = torch.linspace(1.0, 0.3, 29).tolist()
_BINS = 2048
#: An edge takes another range than the model's rule only for this much less output error.
GAIN = 0.002

Quantiser = tuple[float, int]  #: scale, zero point
Ranges = dict[fx.Node, Quantiser]


@dataclass
class Edge:
    """What an image between two layers looks like, over the calibration images."""

    low: float = 0.0
    high: float = 0.0
    sample: Tensor | None = None
    mean: Tensor | None = None  #: per channel
    amax: Tensor | None = None  #: largest value per channel
    images: int = 0
    _candidates: dict[str, Quantiser] = field(default_factory=dict)

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """x [N, C, H, W]"""
        x = x.float()
        mean, amax = x.mean((0, 2, 3)), x.amax((0, 2, 3))
        self.low, self.high = min(self.low, x.min().item()), max(self.high, amax.max().item())
        if self.mean is None:
            self.mean, self.amax, self.sample = mean, amax, x.new_empty(0)
        else:
            self.mean = self.mean + (mean - self.mean) * (x.shape[0] / (self.images + x.shape[0]))
            self.amax = torch.maximum(self.amax, amax)
        self.images += x.shape[0]
        flat = x.flatten()
        picked = flat[torch.randint(flat.numel(), (min(FROM_BATCH, flat.numel()),), generator=generator)]
        self.sample = torch.cat((self.sample, picked))[-SAMPLE:]
        self._candidates.clear()

    def quantiser(self, method: str = "mse") -> Quantiser:
        """(scale, zero point) of uint8 by one of METHODS."""
        if method not in self._candidates:
            self._candidates[method] = quantiser_of(*self._range(method))
        return self._candidates[method]

    def _range(self, method: str) -> tuple[float, float]:
        if method == "min-max":
            return self.low, self.high
        if method == "kl":
            return min((self._clipped(s) for s in _SHRINK), key=self._divergence)
        if method == "mse":
            return min((self._clipped(s) for s in _SHRINK), key=self._squared_error)
        share = (1 - float(method.removesuffix(" %")) / 100) / 2  # on either side
        ordered = self.sample.sort().values
        cut = round(share * ordered.numel())
        low = min(0.0, ordered[cut].item()) if self.low < 0 else 0.0
        # An edge that is never negative has all of its tail at the top.
        cut = cut if self.low < 0 else 2 * cut
        return low, max(0.0, ordered[-1 - min(cut, ordered.numel() - 1)].item())

    def _clipped(self, share: float) -> tuple[float, float]:
        return self.low * share, self.high * share

    def _squared_error(self, ends: tuple[float, float]) -> float:
        return (fake_quantised(self.sample, quantiser_of(*ends)) - self.sample).square().sum().item()

    def _divergence(self, ends: tuple[float, float]) -> float:
        """KL between the clipped values and what 256 codes can say of them (Migacz, TensorRT, 2017)."""
        low, high = min(ends[0], 0.0), max(ends[1], 1e-8)
        width = (high - low) / _BINS
        inside = (self.sample >= low) & (self.sample <= high)
        bins = ((self.sample - low) / width).long().clamp(0, _BINS - 1)
        p = torch.bincount(bins, minlength=_BINS).double()  # clipped values fall into the outer bins
        kept = torch.bincount(bins[inside], minlength=_BINS).double()
        codes = torch.arange(_BINS) * 256 // _BINS
        filled = torch.zeros(256, dtype=torch.float64).index_add_(0, codes, (kept > 0).double())
        mass = torch.zeros(256, dtype=torch.float64).index_add_(0, codes, kept)
        q = torch.where(kept > 0, (mass / filled.clamp(min=1))[codes], 1e-4)
        p, q = p / p.sum(), q / q.sum()
        return (p * (p.clamp(min=1e-12) / q).log()).sum().item()


def quantiser_of(low: float, high: float) -> Quantiser:
    """uint8 from ``low`` to ``high``, zero among the values."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-8)
    return scale, max(0, min(255, round(-low / scale)))


def fake_quantised(x: Tensor, quantiser: Quantiser) -> Tensor:
    """x through uint8 and back, in float32; as quantize_int8_static rounds."""
    scale, zero = quantiser
    return ((x.float() * (1 / scale)).round_() + zero).clamp_(0, 255).sub_(zero).mul_(scale)


def observe_edges(
    graph: Graph,
    batches: Sequence[tuple[Tensor, ...]],
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[fx.Node, Edge]:
    """Every image that a convolution reads, adds or makes, over float runs."""
    generator = torch.Generator().manual_seed(0)
    edges: dict[fx.Node, Edge] = {}
    for index, inputs in enumerate(batches):
        seen: set[fx.Node] = set()

        def observe(node, args, kwargs, output, seen=seen):
            if not calls(node, ops.conv2d.default):
                return
            layer = Layer(node)
            images = [(layer["x"], args[0]), (layer["residual"], kwargs.get("residual")), (node, output)]
            for source, image in images:
                if image is not None and source not in seen:
                    edges.setdefault(source, Edge()).add(image, generator)
                    seen.add(source)

        graph.run(*inputs, observe=observe)
        if progress is not None:
            progress("calibrating", index + 1, len(batches))
    return edges


def output_error(reference: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> float:
    """How far outputs are from a reference: KL of the classes for one output [N, classes], else the sum of the
    outputs' squared errors, each relative to its reference."""
    if len(reference) == 1 and reference[0].dim() == 2 and reference[0].shape[1] > 1:
        p, q = (t[0].double().log_softmax(-1) for t in (reference, ours))
        return (p.exp() * (p - q)).sum(-1).mean().item()
    total = 0.0
    for p, q in zip(reference, ours):
        if p.is_floating_point():
            error = (p.double() - q.double()).square().sum()
            total += (error / p.double().square().sum().clamp(min=1e-30)).item()
    return total


def choose_method(
    edges: Mapping[fx.Node, Edge],
    error: Callable[[Ranges], float],
    methods: Sequence[str] = METHODS,
) -> tuple[Ranges, dict[str, float]]:
    """The ranges of the rule with the least ``error(ranges)``, and every rule's error."""
    tried = {}
    for method in methods:
        tried[method] = error({node: edge.quantiser(method) for node, edge in edges.items()})
    best = min(tried, key=tried.__getitem__)
    return {node: edge.quantiser(best) for node, edge in edges.items()}, tried


def refine_edges(
    edges: Mapping[fx.Node, Edge], ranges: Ranges, error: Callable[[Ranges], float], most: int
) -> tuple[Ranges, int]:
    """Other rules' ranges for single edges, where they lower the error; (ranges, edges that changed).

    The edges whose rules disagree most come first; ``most``: evaluations of ``error``.
    """
    trials = []
    for node in ranges:
        for quantiser in {edges[node].quantiser(m) for m in METHODS} - {ranges[node]}:
            ratio = quantiser[0] / ranges[node][0]
            trials.append((max(ratio, 1 / ratio), node, quantiser))
    trials.sort(key=lambda t: -t[0])
    chosen, best, changed = dict(ranges), error(ranges), set()
    for _, node, quantiser in trials[: max(most - 1, 0)]:
        attempt = chosen | {node: quantiser}
        found = error(attempt)
        if found < best * (1 - GAIN):
            chosen, best = attempt, found
            changed.add(node)
    return chosen, len(changed)
