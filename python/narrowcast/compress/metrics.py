"""What compression cost, in the model's own terms, always against the same weights in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowcast.graph import Graph


def bootstrap(values: Tensor, statistic: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """95 % bounds of ``statistic`` over resampled rows of ``values``."""
    return _bounds(_resampled(values, statistic))


def _resampled(
    values: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0, draws: int = 500
) -> Tensor:
    """``statistic`` of ``draws`` samples of the rows of ``values``, each of as many rows, with repetition."""
    generator = torch.Generator().manual_seed(seed)
    n = values.shape[0]
    return torch.stack([statistic(values[torch.randint(n, (n,), generator=generator)]) for _ in range(draws)])


def _bounds(results: Tensor) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles."""
    low, high = torch.quantile(results.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@dataclass
class Metric:
    """A number with its 95 % bounds. ``loss``: what a budget is compared with (0 = as good as float32)."""

    name: str
    value: float
    low: float
    high: float
    loss: float

    def __str__(self) -> str:
        return f"{self.name} {self.value:.5g} [{self.low:.5g}, {self.high:.5g}]"


def _share(name: str, flags: Tensor) -> Metric:
    """A share of rows; flags [N], 0 or 1."""
    value = flags.mean().item()
    return Metric(name, value, *bootstrap(flags, torch.mean), 1 - value)


class DecoderMetrics:
    """Perplexity ratio, KL(reference || ours) and agreement of the likeliest token, over scored positions.

    Windows of token ids; the second half of each is scored, so that every scored token has context.
    reference: what the results call it; without reference logits, only the perplexity is measured.
    """

    def __init__(self, reference: str = "float32") -> None:
        self.reference = reference
        #: Per window: scored tokens x (nll ours[, nll reference, kl, same top 1]).
        self.rows: list[Tensor] = []

    def add(self, ids: Tensor, reference: Tensor | None, ours: Tensor) -> None:
        """ids [S]; logits [S, V] of both."""
        half = ids.shape[0] // 2
        target = ids[half + 1 :]
        q = ours[half:-1].float().log_softmax(-1)
        columns = [-q.gather(1, target[:, None]).squeeze(1)]
        if reference is not None:
            p = reference[half:-1].float().log_softmax(-1)
            columns.append(-p.gather(1, target[:, None]).squeeze(1))
            columns.append((p.exp() * (p - q)).sum(-1))
            columns.append((p.argmax(-1) == q.argmax(-1)).float())
        self.rows.append(torch.stack(columns, dim=1))

    def results(self) -> dict[str, Metric]:
        rows = torch.cat(self.rows).double()
        # Every metric is a function of the columns' means: texts are long, so they are resampled once for all.
        mean, drawn = rows.mean(0), _resampled(rows, lambda r: r.mean(0)).unbind(1)
        perplexity = Metric("perplexity", mean[0].exp().item(), *_bounds(drawn[0].exp()), 0.0)
        if rows.shape[1] == 1:
            return {"perplexity": perplexity}
        other, kl, same = f"perplexity_{self.reference}", mean[2].item(), mean[3].item()
        increase = ((mean[0] - mean[1]).exp() - 1).item()
        bounds = _bounds((drawn[0] - drawn[1]).exp() - 1)
        perplexity.loss = increase
        return {
            "perplexity": perplexity,
            other: Metric(other, mean[1].exp().item(), *_bounds(drawn[1].exp()), 0.0),
            "perplexity_increase": Metric("perplexity_increase", increase, *bounds, increase),
            "kl": Metric("kl", kl, *_bounds(drawn[2]), kl),
            "same_top1": Metric("same_top1", same, *_bounds(drawn[3]), 1 - same),
        }

    @property
    def scored(self) -> int:
        return sum(r.shape[0] for r in self.rows)


def encoder_metrics(reference: Tensor, ours: Tensor) -> dict[str, Metric]:
    """Cosine of embeddings [items, H] to those of float32."""
    cosine = _cosine(reference, ours)
    mean, least = cosine.mean().item(), cosine.min().item()
    return {
        "cosine": Metric("cosine", mean, *bootstrap(cosine, torch.mean), 1 - mean),
        "cosine_min": Metric("cosine_min", least, least, least, 1 - least),
    }


#: Similarities are compared between at most this many texts: their number grows with the square.
PAIRED_TEXTS = 128


def similarity_metrics(reference: Tensor, ours: Tensor) -> dict[str, Metric]:
    """Spearman's rank correlation of the cosines between all pairs of embeddings [items, H], with those of a reference.

    It says whether a search finds the same neighbours, and does not change when one model's cosines are all larger.
    Bounds resample the items; a pair of an item with itself does not count.
    """
    count = reference.shape[0]
    chosen = torch.linspace(0, count - 1, min(count, PAIRED_TEXTS)).round().long()
    unit = [torch.nn.functional.normalize(x[chosen].double(), dim=-1) for x in (reference, ours)]
    theirs, mine = (x @ x.t() for x in unit)
    upper = torch.triu(torch.ones_like(theirs, dtype=torch.bool), diagonal=1)

    def correlation(items: Tensor) -> Tensor:
        pairs = upper & (items[:, None] != items)
        a, b = (_ranks(x[items][:, items][pairs]) for x in (theirs, mine))
        return torch.corrcoef(torch.stack((a, b)))[0, 1]

    items = torch.arange(len(chosen))
    value = correlation(items).item()
    return {"spearman": Metric("spearman", value, *bootstrap(items, correlation), 1 - value)}


def _ranks(x: Tensor) -> Tensor:
    """Ranks of the values of x; equal values share the mean of their ranks."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]


def image_metrics(reference: Tensor, ours: Tensor) -> dict[str, Metric]:
    """Agreement of the top class, over all images and where the reference is confident (> 0.3); KL of the outputs."""
    p, q = reference.double().log_softmax(-1), ours.double().log_softmax(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    confident = p.exp().amax(-1) > 0.3
    kl = (p.exp() * (p - q)).sum(-1)
    result = {
        "agreement": _share("agreement", same),
        "kl": Metric("kl", kl.mean().item(), *bootstrap(kl, torch.mean), kl.mean().item()),
    }
    if confident.any():
        result["agreement_confident"] = _share("agreement_confident", same[confident])
    return result


def accuracy_metrics(logits: Tensor, classes: Tensor, suffix: str = "") -> dict[str, Metric]:
    """Share of images [N] whose class is the likeliest of logits [N, C], and one of the five likeliest."""
    found = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == classes[:, None]
    top = {f"top1{suffix}": found[:, :1], f"top5{suffix}": found}
    return {name: _share(name, hit.any(-1).double()) for name, hit in top.items()}


#: The metric that a budget is about, by the kind of model.
MAIN = {"decoder": "perplexity_increase", "encoder": "cosine", "image": "agreement"}


def compare(
    kind: str, graph: Graph, exe: Any, batches: Sequence[tuple[Tensor, ...]]
) -> tuple[dict[str, Metric], Tensor]:
    """The metrics of an executor against the float graph it was made from, and the error of every scored item.

    Items and errors: a decoder's positions and their KL, an encoder's texts and 1 - cosine, pictures and their
    KL, the rows of any other model and the relative error of its first output; float64, 1-D.
    """
    if kind == "decoder":
        scores = DecoderMetrics()
        for inputs in batches:
            ids = inputs[0]
            # Caches are written to: the batch keeps its own.
            scores.add(ids[0], graph.run(*(x.clone() for x in inputs))[0], exe.logits(ids)[0])
        return scores.results(), torch.cat(scores.rows)[:, 2].double()
    references, ours = [], []
    for inputs in batches:
        output = exe(*inputs)
        ours.append(output[0] if isinstance(output, tuple) else output)
        references.append(graph.run(*inputs)[0])
    if kind == "generic":
        return {}, torch.cat([_relative(*pair) for pair in zip(references, ours)])
    pair = torch.cat(references), torch.cat(ours)
    if kind == "encoder":
        return encoder_metrics(*pair), 1 - _cosine(*pair)
    return image_metrics(*pair), _kl(*pair)


def _cosine(reference: Tensor, ours: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(reference.double(), ours.double(), dim=-1).flatten()


def _kl(reference: Tensor, ours: Tensor) -> Tensor:
    p, q = reference.double().log_softmax(-1), ours.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _relative(reference: Tensor, ours: Tensor) -> Tensor:
    rows = reference.shape[0] if reference.dim() > 1 else 1
    reference, ours = (x.double().reshape(rows, -1) for x in (reference, ours))
    return (ours - reference).norm(dim=1) / reference.norm(dim=1).clamp(min=1e-30)
