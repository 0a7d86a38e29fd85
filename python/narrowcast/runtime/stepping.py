"""Decoding on a device that captures: one launch per token, with ids and positions that stay on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache

if TYPE_CHECKING:
    from .executor import Executor


@dataclass(frozen=True)
class Advance:
    """What ends the launch of a token: every sequence moves on by one position.

    greedy: the likeliest token is chosen, and written where the next launch reads it; the result is int64 [B], not logits.
    capacity: of the cache. A sequence that has ended goes on until it stays at the last slot; nobody reads it.
    """

    greedy: bool
    capacity: int

    def __call__(self, inputs: list[Tensor], results: list[Tensor]) -> list[Tensor]:
        ids, start = inputs[:2]
        start.add_(1).clamp_(max=self.capacity - 1)
        if not self.greedy:
            return results
        chosen = results[0].argmax(-1)
        ids.copy_(chosen.unsqueeze(1))
        return [chosen]


class DecodeSteps:
    """Tokens of a batch over one cache. The device's ids and positions are written only where the host's differ."""

    def __init__(self, executor: Executor, cache: KVCache, greedy: bool):
        self.executor, self.cache, self.greedy = executor, cache, greedy
        ids = torch.zeros(cache.batch, 1, dtype=torch.long)
        start, rows = torch.zeros(cache.batch, dtype=torch.int32), torch.arange(cache.batch)
        self._tensors = cache.tensors
        self._rows: Tensor | None = rows
        #: What the device holds: tokens (None: any that nobody has chosen yet) and positions.
        self._tokens: list[int] | None = None
        self._starts: list[int] | None = None
        self._program = executor.program(
            ids, start, rows, *cache.tensors, finish=Advance(greedy, cache.capacity)
        )

    def outgrown(self, greedy: bool) -> bool:
        """Whether the next token needs other steps: the cache has grown, or the choice is made elsewhere."""
        return greedy != self.greedy or self._tensors is not self.cache.tensors

    def step(self, tokens: Sequence[int], starts: Sequence[int], ended: Sequence[bool]) -> Tensor | list[int]:
        """The next tokens of a greedy run, else logits [B, V] on the CPU; anything where a sequence has ended."""
        ids = start = None
        if self._tokens is None or _differ(self._tokens, tokens, ended):
            ids = torch.tensor(tokens).unsqueeze(1)
        if self._starts is None or _differ(self._starts, starts, ended):
            start = torch.tensor(starts, dtype=torch.int32)
        inputs = [ids, start, self._rows, *self.cache.tensors]
        self._tokens = self._starts = None  # what the device holds if the launch fails
        (result,) = self.executor.run_program(self._program, inputs, to_host=True)
        self._rows, self._starts = None, [s + 1 for s in starts]
        if not self.greedy:
            return result
        self._tokens = result.tolist()
        return self._tokens


def _differ(held: Sequence[int], wanted: Sequence[int], ended: Sequence[bool]) -> bool:
    return any(h != w and not over for h, w, over in zip(held, wanted, ended))
