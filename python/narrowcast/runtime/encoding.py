"""Texts to vectors with an encoder: tokenised, sorted by length, padded to a bucket under the mask."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentError, UnsupportedError
from .text import load_tokenizer

if TYPE_CHECKING:
    from .executor import Executor

#: Lengths are rounded up to a multiple of this: few programs, little padding.
LENGTH_STEP = 16


class Encoder:
    """Text on top of an executor of kind "encoder"."""

    def __init__(self, executor: Executor):
        if executor.kind != "encoder":
            raise UnsupportedError(f"encode needs an encoder, this graph is {executor.kind!r}")
        self.executor = executor
        config = executor.config
        self.positions = config.get("max_position_embeddings") or config.get("context")

    @functools.cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.executor.assets)
        tokenizer.no_padding()  # files ask for a fixed length, which would be computed for nothing
        if (
            self.positions
            and (tokenizer.truncation or {"max_length": 1 << 30})["max_length"] > self.positions
        ):
            tokenizer.enable_truncation(self.positions)
        return tokenizer

    def encode(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """One result row per text, in the order of the texts."""
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
        rows = [e.ids for e in self.tokenizer.encode_batch(list(texts))]
        if not rows:
            raise ArgumentError("texts must not be empty")
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        results: list[Tensor | None] = [None] * len(rows)
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            ids, mask = padded([rows[i] for i in part], LENGTH_STEP, self.positions)
            self.executor.waste["tokens"] += int(mask.sum())
            self.executor.waste["computed"] += mask.numel()
            outputs = self.executor(ids, mask)
            if not isinstance(outputs, Tensor):
                raise UnsupportedError("encode needs a graph with one output")
            for i, length, row in zip(part, mask.sum(1).tolist(), outputs):
                results[i] = row if row.dim() == 1 else row[:length]
        rows_out = [r for r in results if r is not None]
        if rows_out[0].dim() > 1:  # hidden states of every token: no longer than the longest text
            return torch.nn.utils.rnn.pad_sequence(rows_out, batch_first=True)
        return torch.stack(rows_out)


def padded(rows: Sequence[Sequence[int]], step: int, most: int | None) -> tuple[Tensor, Tensor]:
    """ids and mask int64 [B, S], S a multiple of step but at most `most`; padding is 0 in both."""
    longest = max(1, *map(len, rows))
    length = -(-longest // step) * step
    length = max(longest, min(length, most)) if most else length
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids, mask
