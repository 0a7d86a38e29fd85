"""Calibration: what a layer's inputs look like, kept in constant memory per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from narrowcast.errors import ArgumentError
from narrowcast.graph import Graph
from narrowcast.runtime.encoding import padded

#: Rows of a layer's input that are kept to try quantisers on.
SAMPLE_ROWS = 256
#: Tokens of a window of text, for calibration and for evaluation.
WINDOW = 512


@dataclass
class Statistics:
    """Of the last dimension (channels) of a layer's input, over all valid rows seen."""

    rows: int = 0
    amax: Tensor | None = None  #: max |x| per channel
    square: Tensor | None = None  #: E[x^2] per channel
    mean: Tensor | None = None  #: E[x] per channel
    sample: Tensor | None = None  #: up to SAMPLE_ROWS rows, drawn evenly
    not_finite: int = 0
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def add(self, x: Tensor) -> None:
        """x [rows, channels]."""
        x = x.detach().float()
        finite = x.isfinite()
        if not finite.all():
            self.not_finite += int((~finite).sum())
            x = torch.where(finite, x, 0.0)
        if x.shape[0] == 0:
            return
        amax, square, mean = x.abs().amax(0), x.square().mean(0), x.mean(0)
        if self.rows == 0:
            self.amax, self.square, self.mean, self.sample = amax, square, mean, x[:0]
        else:
            share = x.shape[0] / (self.rows + x.shape[0])
            self.amax = torch.maximum(self.amax, amax)
            self.square = self.square + (square - self.square) * share
            self.mean = self.mean + (mean - self.mean) * share
        self.rows += x.shape[0]
        take = min(x.shape[0], max(1, SAMPLE_ROWS // 4))
        picked = torch.randperm(x.shape[0], generator=self._generator)[:take]
        joined = torch.cat((self.sample, x[picked]))
        if joined.shape[0] > SAMPLE_ROWS:
            joined = joined[torch.randperm(joined.shape[0], generator=self._generator)[:SAMPLE_ROWS]]
        self.sample = joined


def collect(
    graph: Graph,
    nodes: Iterable[fx.Node],
    batches: Sequence[tuple[Tensor, ...]],
    valid: Callable[[tuple[Tensor, ...]], Tensor | None] = lambda inputs: None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[fx.Node, Statistics]:
    """Statistics of the first argument of every node in ``nodes``, over float runs of the graph.

    ``valid(inputs)``: a boolean tensor [B, S] of rows that count (padding does not), or None.
    """
    wanted = set(nodes)
    result = {node: Statistics() for node in wanted}
    for index, inputs in enumerate(batches):
        mask = valid(inputs)

        def observe(node, args, kwargs, output, mask=mask):
            if node not in wanted:
                return
            x = args[0]
            if mask is not None and x.shape[:-1] == mask.shape:
                x = x[mask]
            result[node].add(x.reshape(-1, x.shape[-1]))

        graph.run(*inputs, observe=observe)
        if progress is not None:
            progress("calibrating", index + 1, len(batches))
    return result


def decoder_inputs(graph: Graph, ids: Tensor) -> tuple[Tensor, ...]:
    """The inputs of a decoder graph for token ids [B, S], from an empty cache; logits of every position."""
    batch, length = ids.shape
    caches = []
    for node in graph.inputs[3:]:
        val = node.meta["val"]
        sizes = [batch, int(val.shape[1]), length, *(int(s) for s in val.shape[3:])]
        caches.append(torch.zeros(sizes, dtype=val.dtype))
    start = torch.zeros(batch, dtype=torch.int32)
    return (ids, start, torch.arange(batch * length), *caches)


def token_windows(text: str, tokenizer: Any, bos: int | None, length: int, count: int) -> list[Tensor]:
    """Up to ``count`` windows [1, length] of a text's tokens, each begun with the BOS token if there is one."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    step = length - (bos is not None)
    windows = []
    for first in range(0, len(ids) - step + 1, step):
        window = ids[first : first + step]
        windows.append(torch.tensor([[bos, *window] if bos is not None else window]))
        if len(windows) == count:
            break
    if not windows and len(ids) > 1:  # a short text is one short window
        windows.append(torch.tensor([[bos, *ids] if bos is not None else ids]))
    if not windows:
        raise ArgumentError("data must hold at least a few words of text")
    return windows


def text_batches(texts: Sequence[str], tokenizer: Any, length: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, attention_mask) of sentences in their order, padded to the longest of each batch."""
    return row_batches([tokenizer.encode(t).ids[:length] for t in texts], size)


def row_batches(rows: Sequence[list[int]], size: int) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, attention_mask) of rows of token ids in their order, padded to the longest of each batch."""
    return [padded(rows[first : first + size], step=1, most=None) for first in range(0, len(rows), size)]
