"""The data of a compression: calibrated on, chosen by, held out; never the same rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import ArgumentError
from narrowcast.graph import Graph
from narrowcast.importers.model import Model

from . import hygiene
from .calibrate import WINDOW, decoder_inputs, row_batches, text_batches, token_windows
from .data import fixed_batch, picture_batches, plain_tokenizer, read_texts, sentences
from .default_text import PASSAGES
from .synthetic import random_texts

#: Windows of text for statistics of a layer's inputs, and for GPTQ, which needs more; windows held out.
STATISTICS_WINDOWS, CALIBRATION_WINDOWS, HELD_OUT_WINDOWS = 8, 24, 3
#: The same for recipe "auto", which chooses by as many windows more: bounds of a decoder's loss are wide.
SEARCH_WINDOWS = 10
MEASURED_BATCHES = 20  #: held-out batches that are measured, and as many of calibration
SENTENCES, SEARCH_SENTENCES = 320, 480  #: of a document, for an encoder
PICTURES, CALIBRATED_TOGETHER = 16, 8  #: in a batch that is measured, and in one of calibration


class Data:
    """Calibration batches and held-out batches, never the same rows; in the form that the graph takes.

    search: set as many batches apart once more, to choose by (``selection``).
    """

    def __init__(self, model: Model, graph: Graph, data: Any, seed: int, search: bool = False):
        self.model, self.seed, self.search = model, seed, search
        self.selection: list[tuple[Tensor, ...]] = []
        self.warnings: list[str] = list(model.warnings)
        self.begin: int | None = None  #: the token that a decoder's texts begin with in use
        build = {"decoder": self._decoder, "encoder": self._encoder, "image": self._image}.get(model.kind)
        self.calibration: list[tuple[Tensor, ...]] = []
        self.synthetic: list[tuple[Tensor, ...]] = []  #: rounded for as well, see synthetic.py
        self.held_out: list[tuple[Tensor, ...]] = []
        self.hash: str | None = None
        self.pruning: dict[str, Any] | None = None  #: what was cut
        self.measured = MEASURED_BATCHES  #: batches
        self.sampled = 2  #: rows of the certificate's sample
        self.about: dict[str, Any] = {}  #: what a recipe tried, for the record
        if build is not None:
            build(graph, data)
        elif data is not None:
            batches = [data] if isinstance(data, tuple) else list(data)
            self.calibration, self.held_out = batches[:-1] or batches, batches[-1:]

    def _texts(self, data: Any) -> list[str]:
        if data is None:
            self.warnings.append("calibrated on bundled passages: give data like what the model will see")
            data = PASSAGES
        texts = read_texts(data)
        self.hash = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return texts

    def _decoder(self, graph: Graph, data: Any) -> None:
        tokenizer = plain_tokenizer(self.model.assets)
        text = "\n\n".join(self._texts(data))
        bos = self.model.config.get("bos_token_id")
        config = self.model.config
        length = min(WINDOW, config.get("context") or config.get("max_position_embeddings") or WINDOW)
        most = SEARCH_WINDOWS if self.search else HELD_OUT_WINDOWS
        windows = token_windows(text, tokenizer, bos, length, CALIBRATION_WINDOWS + (1 + self.search) * most)
        self.begin = hygiene.begin_token(tokenizer, bos)
        if self.search:
            windows = [windows[i] for i in self._order(len(windows))]
        keep = min(max(1, len(windows) // 5), most)
        self._split([decoder_inputs(graph, w) for w in windows], keep)

    def _encoder(self, graph: Graph, data: Any) -> None:
        tokenizer = plain_tokenizer(self.model.assets)
        texts = sentences(self._texts(data), SEARCH_SENTENCES if self.search else SENTENCES)
        texts = [texts[i] for i in self._order(len(texts))]
        keep = max(1, len(texts) // 5)
        length = min(int(self.model.config.get("max_position_embeddings", 512)), 256)
        first = 2 * keep if self.search else keep
        # Texts of like length side by side: padding is computed, too.
        rows = sorted((tokenizer.encode(t).ids[:length] for t in texts[first:] or texts), key=len)
        self.calibration = [*row_batches(rows, 16)]
        drawn = random_texts(tokenizer, [len(row) for row in rows], self.seed)
        self.synthetic = [*row_batches(sorted((row[:length] for row in drawn), key=len), 16)]
        self.selection = [*text_batches(texts[keep:first], tokenizer, length, 16)]
        self.held_out = [*text_batches(texts[:keep], tokenizer, length, 16)]

    def _image(self, graph: Graph, data: Any) -> None:
        if data is None:
            return
        if isinstance(data, str | Path):
            from narrowcast.runtime.tasks import load_folder

            data = load_folder(Path(data), self.model.config)
        if not isinstance(data, Tensor) or data.dim() != 4:
            raise ArgumentError("data must be a tensor [N, 3, H, W] or a folder of pictures")
        if data.shape[0] < 2:
            raise ArgumentError("data must hold at least 2 pictures: some are held out")
        self.hash = hashlib.sha256(data.contiguous().view(torch.uint8).numpy().data).hexdigest()
        data = data[torch.tensor(self._order(data.shape[0]))]
        # Ranges need few pictures, and an agreement near 1 needs many.
        keep, fixed = max(1, data.shape[0] // (3 if self.search else 5)), fixed_batch(graph)
        first = 2 * keep if self.search else keep
        calibration = data[first:] if first < data.shape[0] else data
        self.calibration = picture_batches(calibration, fixed or CALIBRATED_TOGETHER, fixed)
        if self.search:
            self.selection = picture_batches(data[keep:first], fixed or PICTURES, fixed)
        self.held_out = picture_batches(data[:keep], fixed or PICTURES, fixed)
        self.measured = -(-MEASURED_BATCHES * PICTURES // (fixed or PICTURES))
        self.sampled = fixed or self.sampled

    def _order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()

    def _split(self, batches: list[tuple[Tensor, ...]], keep: int) -> None:
        """The last ``keep`` are held out, before them as many to choose by; what is left is for calibration."""
        first = len(batches) - keep * (1 + self.search)
        self.calibration = batches[: max(first, 0)] or batches
        self.selection, self.held_out = batches[max(first, 0) : -keep], batches[-keep:]

    def valid(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Rows of an encoder's batch that are not padding."""
        return inputs[1].bool() if self.model.kind == "encoder" else None
