"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from softmax(logits / temperature).

    temperature: 0 takes the largest logit. top_k: only the k largest (0: all). top_p: only the fewest
    tokens whose probabilities reach top_p. seed: of the draws; None takes a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ArgumentError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ArgumentError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p must be in (0, 1], got {self.top_p}")

    def generators(self, count: int) -> list[torch.Generator]:
        """One per sequence, so that a draw does not depend on what shares the batch; seed + index."""
        seed = torch.seed() % (1 << 62) if self.seed is None else self.seed
        return [torch.Generator().manual_seed(seed + i) for i in range(count)]

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token id from logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(self.probabilities(logits), 1, generator=generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """What :meth:`draw` draws from, float32 [V] on the CPU."""
        scores = logits.float().cpu() / self.temperature
        if 0 < self.top_k < scores.numel():
            smallest = scores.topk(self.top_k).values[-1]
            scores = scores.masked_fill(scores < smallest, -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # of all larger ones: the first is always kept
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(0, index, ordered)
        return probabilities / probabilities.sum()
