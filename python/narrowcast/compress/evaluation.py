"""``narrowcast.evaluate``: how good a plan or a model is on data, beside a reference."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.importers.model import Model, describe_file, load_model
from narrowcast.runtime.executor import Executor
from narrowcast.runtime.tasks import load_picture

from . import metrics as measure
from .calibrate import WINDOW, token_windows
from .data import class_indices, labelled_pictures, labels_of_rows, plain_tokenizer, read_texts, sentences

#: Fewer tokens or texts than these say nothing, and have no bounds.
LEAST_TOKENS, LEAST_TEXTS = 32, 10
BATCH, TEXTS_AT_ONCE = 16, 256
MODEL_SUFFIXES = (".gguf", ".onnx", ".pth")

Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    metrics: name -> :class:`narrowcast.compress.metrics.Metric`, a value with its 95 % bounds.
    count, unit: how many tokens, texts or pictures were scored.
    reference: what it was measured against, None when against nothing.
    """

    kind: str
    recipe: str
    reference: str | None
    count: int
    unit: str
    metrics: dict[str, measure.Metric]
    notes: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """What a budget of :func:`narrowcast.compress` is compared with; None without a reference."""
        main = self.metrics.get(measure.MAIN[self.kind])
        return None if main is None else main.loss

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not finite is None."""
        return {
            "kind": self.kind,
            "recipe": self.recipe,
            "reference": self.reference,
            "count": self.count,
            "unit": self.unit,
            "loss": _finite(self.loss),
            "metrics": {
                name: {"value": _finite(m.value), "low": _finite(m.low), "high": _finite(m.high)}
                for name, m in self.metrics.items()
            },
            "notes": self.notes,
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        against = "" if self.reference is None else f" against {self.reference}"
        head = f"{self.kind}, {self.recipe}{against}, {self.count} {self.unit}"
        return "\n".join([head, *(f"  {m}" for m in self.metrics.values()), *self.notes])


def evaluate(
    plan: Any,
    data: Any,
    reference: Any = None,
    labels: Any = None,
    *,
    limit: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a plan, or a model in float32, on data.

    plan: a ``Plan``, an ``Executor``, the path of a plan, or what :func:`narrowcast.importers.load_model` takes.
    data: for language models and encoders a text, a list of texts, the path of a text file or of a folder of .txt
        files; for image models a tensor [N, 3, H, W] as the model takes it, a folder of pictures, or a folder
        with one subfolder of pictures per label. Give data that calibration did not see.
    reference: in the forms of ``plan``; a model is run in float32. None: the file that the plan was made from,
        when it lies beside the plan, else nothing.
    labels: for image models: class numbers or names, as a sequence for a tensor, else as a mapping from file to
        label or the path of a .csv or .json file.
    limit: at most this many windows of 512 tokens, texts or pictures (evenly chosen).
    device, threads: see :class:`narrowcast.Executor`; an ``Executor`` that is given keeps its own.

    Language models: "perplexity"; against a reference also "perplexity_reference", "perplexity_increase"
    (relative), "kl" (reference || plan) and "same_top1". Encoders: "cosine" and "cosine_min" to the reference's
    vectors, "spearman" of the similarities of all pairs. Image models: "agreement" of the likeliest class,
    "agreement_confident" where the reference gives it more than 0.3, "kl"; with labels "top1" and "top5", also of
    the reference ("top1_reference", "top5_reference").

    Raises ArgumentError for data or labels that cannot be used, and for a reference of another kind, vocabulary,
    tokenizer or size of output; UnsupportedError for models that are none of the three kinds.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit must be at least 1, got {limit}")
    ours = executor_of(plan, device, threads)
    if ours.kind not in measure.MAIN:
        raise UnsupportedError(
            f"evaluate measures {', '.join(measure.MAIN)} models, this one is {ours.kind!r}"
        )
    if labels is not None and ours.kind != "image":
        raise ArgumentError(f"labels must be None for a model of kind {ours.kind}: they belong to pictures")
    if reference is None:
        reference = _source_beside(ours.source)
    theirs = None if reference is None else executor_of(reference, device, threads)
    if theirs is not None and theirs.kind != ours.kind:
        raise ArgumentError(f"reference must be of kind {ours.kind} as the model is, got {theirs.kind}")
    notes = [] if theirs is None else _same_source(ours.source, theirs.source)
    tell = progress or (lambda what, done, total: None)
    if ours.kind == "decoder":
        windows = _windows(ours, theirs, data, limit)
        scores = decoder_scores({"": ours}, windows, theirs, progress=tell)[""]
        count, unit, results = scores.scored, "tokens", scores.results()
    elif ours.kind == "encoder":
        texts = sentences(read_texts(data))[:limit]
        count, unit, results = len(texts), "texts", _encoders(ours, theirs, texts, tell)
    else:
        count, results = _images(ours, theirs, data, labels, limit, tell, notes)
        unit = "pictures"
    return Evaluation(ours.kind, _recipe(ours), _name(theirs), count, unit, results, notes)


# --- what is measured, and against what ------------------------------------------------------------


def float_plan(model: Model) -> Plan:
    """The model as it is, in float32, after the graph passes."""
    fused, _ = optimize(Graph.from_exported(model.exported))
    return Plan(fused, model.kind, "fp32", config=model.config, assets=model.assets, source=model.source)


def executor_of(model: Any, device: str = "auto", threads: int | None = None) -> Executor:
    """The executor of a plan, of a path of one, or of a model in float32; an executor is returned as it is."""
    if isinstance(model, Executor):
        return model
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        is_model = path.is_dir() or path.suffix.lower() in MODEL_SUFFIXES
        model = load_model(path) if is_model else Plan.load(path)
    if not isinstance(model, Plan):
        model = float_plan(load_model(model))
    return Executor(model, device=device, threads=threads)


def _source_beside(plan: Any) -> Path | None:
    """The file that a plan was made from, bit for bit, when it lies in the plan's folder."""
    if not isinstance(plan, Plan) or plan.path is None:
        return None
    # The name comes out of a file: only a name, never a way to another folder.
    path = plan.path.parent / Path(str(plan.source.get("path", ""))).name
    if path.suffix.lower() not in MODEL_SUFFIXES or not path.is_file():
        return None
    return path if describe_file(path)["sha256"] == plan.source.get("sha256") else None


def _same_source(ours: Any, theirs: Any) -> list[str]:
    sums = [getattr(plan, "source", {}).get("sha256") for plan in (ours, theirs)]
    if None in sums or sums[0] == sums[1]:
        return []
    return ["the reference was not made from the same file: differences are not those of compression alone"]


def _recipe(executor: Executor) -> str:
    return getattr(executor.source, "recipe", "fp32")


def _name(executor: Executor | None) -> str | None:
    if executor is None:
        return None
    file = getattr(executor.source, "source", {}).get("path")
    return _recipe(executor) + (f" of {file}" if file else "")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- language models ------------------------------------------------------------------------------


def decoder_scores(
    executors: Mapping[str, Executor],
    windows: Sequence[Tensor],
    reference: Executor | None,
    called: str = "reference",
    progress: Progress = lambda what, done, total: None,
) -> dict[str, measure.DecoderMetrics]:
    """Scores of several decoders on windows [1, S] of token ids; the reference runs once for all.

    called: the reference's name in the results.
    """
    scores = {name: measure.DecoderMetrics(called) for name in executors}
    for index, window in enumerate(windows):
        expected = None if reference is None else reference.logits(window)[0].cpu()
        for name, executor in executors.items():
            logits = executor.logits(window)[0].cpu()
            if expected is not None and expected.shape != logits.shape:
                raise ArgumentError(
                    f"reference must have the model's vocabulary of {logits.shape[-1]} tokens, got {expected.shape[-1]}"
                )
            scores[name].add(window[0], expected, logits)
        progress("measuring", index + 1, len(windows))
    return scores


def _windows(ours: Executor, theirs: Executor | None, data: Any, limit: int | None) -> list[Tensor]:
    text = "\n\n".join(read_texts(data))
    tokenizer = plain_tokenizer(ours.assets)
    length = min([WINDOW, *(e.decoder.positions for e in (ours, theirs) if e is not None)])
    windows = token_windows(text, tokenizer, ours.config.get("bos_token_id"), length, limit or sys.maxsize)
    if windows[0].shape[1] < min(LEAST_TOKENS, length):
        raise ArgumentError(
            f"data must hold at least {LEAST_TOKENS} tokens of text, got {windows[0].shape[1]}"
        )
    asset = "tokenizer.json"
    if theirs is not None and theirs.assets.get(asset, ours.assets[asset]) != ours.assets[asset]:
        # Files of one model may write their tokenizer in different ways; what counts is what it makes of a text.
        part, other = text[:10_000], plain_tokenizer(theirs.assets)
        ids = [t.encode(part, add_special_tokens=False).ids for t in (tokenizer, other)]
        if ids[0] != ids[1]:
            raise ArgumentError(
                "reference must have the model's vocabulary, its tokenizer gives other tokens"
            )
    return windows


# --- encoders -------------------------------------------------------------------------------------


def _encoders(
    ours: Executor, theirs: Executor | None, texts: list[str], progress: Progress
) -> dict[str, measure.Metric]:
    if theirs is None:
        raise ArgumentError("reference must be given for an encoder: the model that the plan was made from")
    if len(texts) < LEAST_TEXTS:
        raise ArgumentError(f"data must hold at least {LEAST_TEXTS} texts or sentences, got {len(texts)}")
    parts: list[list[Tensor]] = [[], []]
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[first : first + TEXTS_AT_ONCE]
        for part, executor in zip(parts, (theirs, ours)):
            vectors = executor.encode(some).cpu()
            if vectors.dim() != 2:
                raise UnsupportedError("evaluate measures pooling encoders; this one gives hidden states")
            part.append(vectors)
        progress("measuring", min(first + TEXTS_AT_ONCE, len(texts)), len(texts))
    pair = [torch.cat(part) for part in parts]
    if pair[0].shape != pair[1].shape:
        raise ArgumentError(
            f"reference must give vectors of {pair[1].shape[1]} numbers as the model does, got {pair[0].shape[1]}"
        )
    return {**measure.encoder_metrics(*pair), **measure.similarity_metrics(*pair)}


# --- image models ---------------------------------------------------------------------------------


def _images(
    ours: Executor, theirs: Executor | None, data: Any, labels: Any, limit: int | None, progress: Progress,
    notes: list[str],
) -> tuple[int, dict[str, measure.Metric]]:  # fmt: skip
    if isinstance(data, str | Path):
        pictures, given = labelled_pictures(Path(data), labels)
    elif isinstance(data, Tensor) and data.dim() == 4 and data.shape[0] > 0:
        pictures, given = list(data), labels_of_rows(labels, data.shape[0])
    else:
        raise ArgumentError("data must be a tensor [N, 3, H, W] or a folder of pictures")
    if limit is not None and limit < len(pictures):
        chosen = torch.linspace(0, len(pictures) - 1, limit).round().long().tolist()
        pictures, given = [pictures[i] for i in chosen], [given[i] for i in chosen]
    labelled = [i for i, label in enumerate(given) if label is not None]
    if theirs is None and not labelled:
        raise ArgumentError(
            "reference or labels must be given: there is nothing to measure the pictures against"
        )
    if 0 < len(labelled) < len(pictures):
        notes.append(f"top1 and top5 are of {len(labelled)} pictures: the others carry no label")
    executors = [ours] if theirs is None else [ours, theirs]
    parts: list[list[Tensor]] = [[] for _ in executors]
    classes: list[int] = []
    for first in range(0, len(pictures), BATCH):
        # Each model has its own size and normalisation of a picture; a tensor is what both take.
        for part, executor in zip(parts, executors):
            output = _outputs(executor, _batch(pictures[first : first + BATCH], executor))
            if not isinstance(output, Tensor) or output.dim() != 2:
                raise UnsupportedError("evaluate measures image models with one output [N, classes]")
            part.append(output.float().cpu())
        widths = [part[0].shape[1] for part in parts]
        if widths[0] != widths[-1]:
            raise ArgumentError(f"reference must have the model's {widths[0]} classes, got {widths[-1]}")
        if not classes:  # before the long run, so that a label that is wrong costs nothing
            classes = class_indices(given, ours.assets.get("labels", b"").decode().splitlines(), widths[0])
        progress("measuring", min(first + BATCH, len(pictures)), len(pictures))
    logits = [torch.cat(part) for part in parts]
    results = {} if theirs is None else measure.image_metrics(logits[1], logits[0])
    if labelled:
        target = torch.tensor(classes)[labelled]
        for rows, suffix in zip(logits, ("", "_reference")):
            results |= measure.accuracy_metrics(rows[labelled], target, suffix)
    return len(pictures), results


def _outputs(executor: Executor, x: Tensor) -> Any:
    """What a model makes of any number of pictures, also one that takes a fixed number at once."""
    size = executor.batch_size
    if size is None or size == x.shape[0]:
        return executor(x)
    parts = []
    for part in x.split(size):
        rows = part.shape[0]
        # The last pictures are repeated to fill a batch up, and their second results dropped.
        output = executor(torch.cat([part, *[part[-1:]] * (size - rows)]))
        if not isinstance(output, Tensor):
            return output
        parts.append(output[:rows])
    return torch.cat(parts)


def _batch(pictures: Sequence[Path | Tensor], executor: Executor) -> Tensor:
    rows = [load_picture(p, executor.config)[0] if isinstance(p, Path) else p for p in pictures]
    return torch.stack(rows)
