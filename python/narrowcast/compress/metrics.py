"""What compression cost, in the model's own terms, always against the same weights in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def bootstrap(
    values: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0, draws: int = 500
) -> tuple[float, float]:
    """95 % bounds of ``statistic`` over resampled rows of ``values``."""
    generator = torch.Generator().manual_seed(seed)
    n = values.shape[0]
    results = torch.stack(
        [statistic(values[torch.randint(n, (n,), generator=generator)]) for _ in range(draws)]
    )
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


class DecoderMetrics:
    """Perplexity ratio, KL(float || ours) and agreement of the likeliest token, over scored positions.

    Windows of token ids; the second half of each is scored, so that every scored token has context.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # per window: scored tokens x (nll reference, nll ours, kl, same top 1)

    def add(self, ids: Tensor, reference: Tensor, ours: Tensor) -> None:
        """ids [S]; logits [S, V] of both."""
        half = ids.shape[0] // 2
        target = ids[half + 1 :]
        p = reference[half:-1].float().log_softmax(-1)
        q = ours[half:-1].float().log_softmax(-1)
        nll = [-x.gather(1, target[:, None]).squeeze(1) for x in (p, q)]
        kl = (p.exp() * (p - q)).sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).float()
        self.rows.append(torch.stack([*nll, kl, same], dim=1))

    def results(self) -> dict[str, Metric]:
        rows = torch.cat(self.rows)
        ratio = lambda r: (r[:, 1].mean() - r[:, 0].mean()).exp() - 1  # noqa: E731
        increase = ratio(rows).item()
        metrics = {
            "perplexity": Metric("perplexity", rows[:, 1].mean().exp().item(), *bootstrap(rows, lambda r: r[:, 1].mean().exp()), increase),
            "perplexity_float32": Metric("perplexity_float32", rows[:, 0].mean().exp().item(), *bootstrap(rows, lambda r: r[:, 0].mean().exp()), 0.0),
            "perplexity_increase": Metric("perplexity_increase", increase, *bootstrap(rows, ratio), increase),
            "kl": Metric("kl", rows[:, 2].mean().item(), *bootstrap(rows, lambda r: r[:, 2].mean()), rows[:, 2].mean().item()),
            "same_top1": Metric("same_top1", rows[:, 3].mean().item(), *bootstrap(rows, lambda r: r[:, 3].mean()), 1 - rows[:, 3].mean().item()),
        }  # fmt: skip
        return metrics

    @property
    def scored(self) -> int:
        return sum(r.shape[0] for r in self.rows)


def encoder_metrics(reference: Tensor, ours: Tensor) -> dict[str, Metric]:
    """Cosine of embeddings [items, H] to those of float32."""
    cosine = torch.nn.functional.cosine_similarity(reference.double(), ours.double(), dim=-1)
    mean, least = cosine.mean().item(), cosine.min().item()
    return {
        "cosine": Metric("cosine", mean, *bootstrap(cosine, torch.mean), 1 - mean),
        "cosine_min": Metric("cosine_min", least, least, least, 1 - least),
    }


def image_metrics(reference: Tensor, ours: Tensor) -> dict[str, Metric]:
    """Agreement of the top class, over all images and where float32 is confident (> 0.3); KL of the outputs."""
    p, q = reference.double().log_softmax(-1), ours.double().log_softmax(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    confident = p.exp().amax(-1) > 0.3
    kl = (p.exp() * (p - q)).sum(-1)
    result = {
        "agreement": Metric(
            "agreement", same.mean().item(), *bootstrap(same, torch.mean), 1 - same.mean().item()
        ),
        "kl": Metric("kl", kl.mean().item(), *bootstrap(kl, torch.mean), kl.mean().item()),
    }
    if confident.any():
        sure = same[confident]
        result["agreement_confident"] = Metric(
            "agreement_confident", sure.mean().item(), *bootstrap(sure, torch.mean), 1 - sure.mean().item()
        )
    return result


#: The metric that a budget is about, by the kind of model.
MAIN = {"decoder": "perplexity_increase", "encoder": "cosine", "image": "agreement"}
