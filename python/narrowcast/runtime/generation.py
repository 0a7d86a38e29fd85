"""Decoding with a key/value cache: prefill in chunks, then one program for every token.

Sequences of a batch are padded on the right. A padded row writes cache slots behind its sequence; they
are overwritten before any query may see them, so every sequence gets the result it would get alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentError, UnsupportedError
from .cache import KVCache, capacity_for, padded_length
from .sampling import Sampling
from .stepping import DecodeSteps
from .text import TextStream, apply_chat_template, load_tokenizer

if TYPE_CHECKING:
    from .captured import CapturedProgram
    from .executor import Executor
    from .program import Program

#: Tokens per sequence that one prefill program takes; longer prompts go in pieces.
CHUNK = 512


class Decoder:
    """Generation on top of an executor of kind "decoder"."""

    def __init__(self, executor: Executor):
        if executor.kind != "decoder":
            raise UnsupportedError(f"generation needs a decoder, this graph is {executor.kind!r}")
        self.executor = executor
        self.config, self.assets = executor.config, executor.assets
        self.layout = executor.cache_layout()
        self.positions: int = self.config.get("context") or self.config.get("max_position_embeddings") or 0
        if self.positions < 1:
            raise UnsupportedError('a decoder needs config["context"], the number of its positions')
        self._free: list[KVCache] = []
        self._stepping: tuple[list[Tensor], Program | CapturedProgram] | None = None
        self._steps: DecodeSteps | None = None

    # Text

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.assets)

    @property
    def eos(self) -> frozenset[int]:
        """Token ids that end a sequence."""
        ids = self.config.get("eos_token_id")
        return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def _token_text(self, name: str) -> str:
        token = self.config.get(f"{name}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        return self.tokenizer.id_to_token(token) or "" if isinstance(token, int) else ""

    def encode(self, prompt: str | Sequence[Any]) -> list[int]:
        """Token ids of a text, of messages (through the chat template), or the ids given."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt).ids
        if isinstance(prompt, Tensor):
            return prompt.flatten().tolist()
        if prompt and isinstance(prompt[0], dict):
            marks = self._token_text("bos"), self._token_text("eos")
            text = apply_chat_template(self.assets, prompt, *marks)
            # The template writes the special tokens itself.
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return [int(i) for i in prompt]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def texts(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int | None,
        stop: Sequence[str],
    ) -> Iterator[tuple[int, str]]:
        """(sequence, piece of text) as they become certain."""
        streams = [TextStream(self.decode, stop) for _ in prompts]
        done = [False] * len(prompts)
        for i, token in self.tokens(prompts, sampling, max_new_tokens, done):
            piece = streams[i].add(token)
            done[i] = streams[i].stopped
            if piece:
                yield i, piece
        for i, stream in enumerate(streams):
            if piece := stream.finish():
                yield i, piece

    # Tokens

    def tokens(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int | None = None,
        done: list[bool] | None = None,
        eos: frozenset[int] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """(sequence, token id) in the order of the run, without the ids that end a sequence.

        `done` is shared with the caller: setting done[i] ends sequence i.
        """
        self._check(prompts)
        generators = sampling.generators(len(prompts))
        if not self.executor.batch_invariant:
            yield from self._run(prompts, sampling, generators, max_new_tokens, done, eos)
            return
        runs = [
            self._run([p], sampling, [g], max_new_tokens, done, eos, i)
            for i, (p, g) in enumerate(zip(prompts, generators))
        ]
        for row in itertools.zip_longest(*runs):
            yield from (item for item in row if item is not None)

    def _run(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        generators: list[torch.Generator],
        max_new_tokens: int | None,
        done: list[bool] | None,
        eos: frozenset[int] | None,
        first: int = 0,
    ) -> Iterator[tuple[int, int]]:
        eos = self.eos if eos is None else eos
        lengths = [len(p) for p in prompts]
        limit = self.positions if max_new_tokens is None else max_new_tokens
        wanted = max(lengths) + min(limit, 2 * CHUNK)
        cache = self._take(len(prompts), capacity_for(wanted, self.positions))
        ended = [False] * len(prompts)
        try:
            # Logits, or the tokens themselves where the device has chosen.
            rows: Tensor | list[int] | None = self._prefill(prompts, cache) if limit > 0 else None
            for count in range(1, limit + 1):
                tokens = [0] * len(prompts)
                for i, generator in enumerate(generators):
                    if ended[i]:
                        continue
                    tokens[i] = rows[i] if isinstance(rows, list) else sampling.draw(rows[i], generator)
                    if tokens[i] in eos:
                        ended[i] = True
                        continue
                    yield first + i, tokens[i]
                    if done is not None and done[first + i]:
                        ended[i] = True
                    if lengths[i] + 1 > self.positions:
                        ended[i] = True
                if all(ended) or count == limit:
                    return
                if max(lengths) + 1 > cache.capacity:
                    cache.grow(capacity_for(max(lengths) + 1, self.positions))
                # An ended sequence repeats its last slot; nobody reads it.
                starts = [min(n, cache.capacity - 1) for n in lengths]
                rows = self._step(tokens, starts, ended, cache, sampling.temperature == 0)
                lengths = [n if over else n + 1 for n, over in zip(lengths, ended)]
        finally:
            self._free.append(cache)

    def _check(self, prompts: list[list[int]]) -> None:
        for i, p in enumerate(prompts):
            if not p:
                raise ArgumentError(f"prompt {i} must have at least one token")
            if len(p) > self.positions:
                raise ArgumentError(f"prompt {i} must have at most {self.positions} tokens, got {len(p)}")

    def _take(self, batch: int, capacity: int) -> KVCache:
        """A cache of this batch: a free one is reused, since programs are bound to its address."""
        for i, cache in enumerate(self._free):
            if cache.batch == batch and cache.capacity >= capacity:
                return self._free.pop(i)
        self._free.clear()
        return KVCache(self.layout, batch, capacity, self.executor.device)

    def _forward(self, ids: Tensor, start: Tensor, rows: Tensor, cache: KVCache) -> Tensor:
        self.executor.waste["computed"] += ids.numel()
        return self.executor(ids, start, rows, *cache.tensors)

    def _step(
        self, tokens: list[int], starts: list[int], ended: list[bool], cache: KVCache, greedy: bool
    ) -> Tensor | list[int]:
        """Logits [B, V] after one token per sequence, always by the same program; on a GPU a greedy choice."""
        for count in self.executor.waste:
            self.executor.waste[count] += len(tokens)
        if self.executor.graphs:
            if self._steps is None or self._steps.cache is not cache or self._steps.outgrown(greedy):
                self._steps = DecodeSteps(self.executor, cache, greedy)
            return self._steps.step(tokens, starts, ended)
        start = torch.tensor(starts, dtype=torch.int32)
        inputs = [torch.tensor(tokens).unsqueeze(1), start, torch.arange(len(tokens)), *cache.tensors]
        if self._stepping is None or self._stepping[0] is not cache.tensors:
            # Checked and looked up once; after that a token costs no Python per cache tensor but its address.
            self._stepping = cache.tensors, self.executor.program(*inputs)
        return self.executor.run_program(self._stepping[1], inputs)[0]

    def _prefill(self, prompts: list[list[int]], cache: KVCache) -> Tensor:
        """Fills the cache; logits [B, V] of every prompt's last token."""
        lengths = torch.tensor([len(p) for p in prompts])
        last: list[Tensor | None] = [None] * len(prompts)
        for offset, ids in self._chunks(prompts, cache.capacity):
            size = ids.shape[1]
            row = lengths - 1 - offset
            rows = row.clamp(0, size - 1) + torch.arange(len(prompts)) * size
            start = torch.full((len(prompts),), offset, dtype=torch.int32)
            logits = self._forward(ids, start, rows, cache)
            for i in ((row >= 0) & (row < size)).nonzero().flatten().tolist():
                last[i] = logits[i]
        return torch.stack([t for t in last if t is not None])

    def _chunks(self, prompts: list[list[int]], capacity: int) -> Iterator[tuple[int, Tensor]]:
        """(offset, ids [B, S]) in pieces of CHUNK, padded to a bucket where the cache has room."""
        longest = max(map(len, prompts))
        self.executor.waste["tokens"] += sum(map(len, prompts))
        for offset in range(0, longest, CHUNK):
            size = min(CHUNK, longest - offset)
            padded = padded_length(size)
            size = padded if offset + padded <= capacity else size
            ids = torch.zeros(len(prompts), size, dtype=torch.long)
            for i, p in enumerate(prompts):
                piece = p[offset : offset + size]
                ids[i, : len(piece)] = torch.tensor(piece, dtype=torch.long)
            yield offset, ids

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] of every position of ids [B, S]; for evaluation."""
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.shape[1] > self.positions:
            raise ArgumentError(
                f"ids must be [B, S] with 1 to {self.positions} positions, got {list(ids.shape)}"
            )
        batch, length = ids.shape
        prompts = ids.tolist()
        cache = self._take(batch, capacity_for(length, self.positions))
        parts = []
        try:
            for offset, piece in self._chunks(prompts, cache.capacity):
                size = min(length - offset, piece.shape[1])
                rows = torch.arange(batch)[:, None] * piece.shape[1] + torch.arange(size)
                start = torch.full((batch,), offset, dtype=torch.int32)
                logits = self._forward(piece, start, rows.flatten(), cache)
                parts.append(logits.view(batch, size, -1))
        finally:
            self._free.append(cache)
        return torch.cat(parts, dim=1)
