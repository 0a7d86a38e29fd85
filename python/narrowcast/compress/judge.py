"""Whether a plan is inside a budget: an upper bound of what data that nobody looked at will show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowcast.graph import Graph

#: Normal quantile of the bound: one final part in a hundred shows more, if its data is like the selection's.
QUANTILE = 2.326


@dataclass(frozen=True)
class Verdict:
    """Of a plan on the selection part. loss: its estimate. bound: what the final part stays below."""

    loss: float
    bound: float


class Judge:
    """Measures plans on the selection part, beside the float graph, whose outputs are kept.

    The bound is one of *prediction*: with n items here and m in the final part, the means of both scatter, so it
    lies QUANTILE * sqrt(var / n + var / m) above the mean.

    Decoders: the mean difference of negative log-likelihoods of the tokens in the second half of each window.
    Encoders: 1 - cosine of each text. Images: the top class changes where a picture's margin, the lead of its first
    class over the second, is smaller than the error of that lead. Counting such pictures says little when they are
    few, so each counts with its probability, under a normal error of the size measured over all pictures; the count
    itself is used where it is larger.
    """

    def __init__(
        self,
        kind: str,
        graph: Graph,
        selection: Sequence[tuple[Tensor, ...]],
        final: Sequence[tuple[Tensor, ...]],
    ):
        self.kind, self.batches = kind, selection
        self.reference = [self._reference(graph, inputs) for inputs in selection]
        rows = [inputs[0] for inputs in final]
        self.final = sum(scored(ids.shape[1]) if kind == "decoder" else ids.shape[0] for ids in rows)

    def _reference(self, graph: Graph, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.kind != "decoder":
            return graph.run(*inputs)[0].double()
        logits = graph.run(*(x.clone() for x in inputs))[0]
        return likelihoods(inputs[0][0], logits)

    def __call__(self, executor: Any) -> Verdict:
        ours = []
        for inputs in self.batches:
            if self.kind == "decoder":
                ours.append(likelihoods(inputs[0][0], executor.logits(inputs[0])[0]))
            else:
                output = executor(*inputs)
                ours.append((output[0] if isinstance(output, tuple) else output).double())
        pair = torch.cat(self.reference), torch.cat(ours)
        if self.kind == "decoder":
            return self._increase(pair[1] - pair[0])
        if self.kind == "encoder":
            lost = 1 - torch.nn.functional.cosine_similarity(*pair, dim=-1).flatten()
            return self._mean(lost)
        return self._changed(*pair)

    def _spread(self, here: float, there: float, count: int) -> float:
        return QUANTILE * math.sqrt(here / max(count, 1) + there / max(self.final, 1))

    def _mean(self, lost: Tensor) -> Verdict:
        mean, variance = lost.mean().item(), _variance(lost)
        return Verdict(mean, mean + self._spread(variance, variance, lost.numel()))

    def _increase(self, lost: Tensor) -> Verdict:
        verdict = self._mean(lost)
        return Verdict(math.expm1(verdict.loss), math.expm1(verdict.bound))

    def _changed(self, reference: Tensor, ours: Tensor) -> Verdict:
        chance = flip_chance(reference, ours)
        count = (reference.argmax(-1) != ours.argmax(-1)).double().mean().item()
        loss = max(chance.mean().item(), count)
        spread = self._spread(_variance(chance), loss * (1 - loss), chance.numel())
        return Verdict(loss, loss + spread)


def scored(length: int) -> int:
    """Scored tokens of a window: its second half, as in metrics.DecoderMetrics."""
    return length - length // 2 - 1


def likelihoods(ids: Tensor, logits: Tensor) -> Tensor:
    """Negative log-likelihood [scored tokens], float64, of ids [S] under logits [S, V]."""
    half = ids.shape[0] // 2
    rows = logits[half:-1].float().log_softmax(-1)
    return -rows.gather(1, ids[half + 1 :, None]).squeeze(1).double()


def flip_chance(reference: Tensor, ours: Tensor) -> Tensor:
    """How likely the first class of each row [N, C] is another one, with errors like those of all rows."""
    top = reference.topk(2, dim=-1)
    lead = top.values[:, 0] - top.values[:, 1]
    mine = ours.gather(1, top.indices)
    error = (mine[:, 0] - mine[:, 1] - lead).square().mean().sqrt()
    if error == 0:
        return torch.zeros_like(lead)
    return 0.5 * torch.erfc(lead / error / math.sqrt(2))


def _variance(x: Tensor) -> float:
    return x.var().item() if x.numel() > 1 else 0.0
