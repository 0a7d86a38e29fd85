"""``narrowcast.compress``: one call from a model to a plan with a certificate."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast._version import __version__
from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.graph.passes.match import Layer
from narrowcast.importers.model import Model, load_model
from narrowcast.runtime.executor import Executor, resolve_device
from narrowcast.runtime.verify import certify

from . import hygiene, preflight, rotation
from . import metrics as measure
from .calibrate import WINDOW, collect, decoder_inputs, row_batches, text_batches, token_windows
from .cnn import quantize_cnn
from .cost import OBJECTIVES
from .data import fixed_batch, picture_batches, plain_tokenizer, read_texts, sentences
from .default_text import PASSAGES
from .distill import distill as distill_graph
from .gptq import DAMPING
from .half_attention import narrow_attention
from .kv_cache import KINDS as CACHES
from .kv_cache import common_keys, quantize_kv_cache
from .prune import prune_graph
from .search import KINDS, Search
from .sequential import round_in_sequence
from .synthetic import random_texts
from .transformer import (
    Decision,
    int4_targets,
    int8_targets,
    layer_name,
    quantize_grouped,
    quantize_int8,
    smooth,
)
from .work_folder import WorkFolder, fingerprint

ops = torch.ops.narrowcast

RECIPES = ("native", "fp32", "int8", "int8-weight", "int4")

#: Windows of text for statistics of a layer's inputs, and for GPTQ, which needs more; windows held out.
STATISTICS_WINDOWS, CALIBRATION_WINDOWS, HELD_OUT_WINDOWS = 8, 24, 3
#: The same for recipe "auto", which chooses by as many windows more: bounds of a decoder's loss are wide.
SEARCH_WINDOWS = 10
MEASURED_BATCHES = 20  #: held-out batches that are measured, and as many of calibration
SENTENCES, SEARCH_SENTENCES = 320, 480  #: of a document, for an encoder
PICTURES, CALIBRATED_TOGETHER = 16, 8  #: in a batch that is measured, and in one of calibration
#: For int4 the weights lose more than int8 activations in groups do, and products of integers are much faster.
INT4_ACTIVATION_BITS = 8
Progress = Callable[[str, int, int], Any]


def compress(
    model: Any,
    *,
    recipe: str = "int8",
    data: Any = None,
    budget: float | None = None,
    objective: str = "bytes",
    kv_cache: str = "float",
    group_size: int | None = None,
    symmetric: bool = False,
    rotate: bool = False,
    keep_float: Sequence[str] = (),
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    work: str | Path | None = None,
    prune: float | None = None,
    distill: int = 0,
    **options: Any,
) -> Plan:
    """Compresses a model and measures what that cost.

    model: whatever :func:`narrowcast.importers.load_model` takes (options go there), or its result.
    recipe: "native" (the file's own codes), "fp32", "int8" (W8A8), "int8-weight" (int8 in groups,
        16-bit activations), "int4" (int4 in groups of 32 by GPTQ, int8 activations; convolutions int4 per output
        channel, the sensitive and the depthwise ones int8), or "auto" (a form for every layer, the cheapest within
        ``budget``; see :mod:`narrowcast.compress.search`).
    data: for language models and encoders a text, a list of texts or a path of a text file; for image models
        a tensor [N, 3, H, W] as the model takes it, or a folder of pictures. A fifth is held out and measured;
        "auto" chooses by a second fifth (of pictures: thirds).
        None: a few bundled passages for text; image models need data for "int8" and "int4".
    budget: the largest loss of the model's own metric on held-out data: relative perplexity increase, 1 - mean
        cosine, or 1 - top-class agreement. A result outside it raises; "auto" goes back to float32 if it must.
    objective: what "auto" makes small: "bytes" of the plan, or "latency", measured with the kernels of this machine;
        then a layer that is not faster quantised stays in float.
    kv_cache: "float", or "int8" or "int4" (rotated) for a decoder's cache.
    group_size: of weights along K for the grouped recipes (default 32); of activations for "int8" (default 64, for
        encoders 32; 0 is one scale per token).
        A layer whose inputs it does not divide has smaller groups, and says so.
    symmetric: int4 without zero points: a tenth fewer bytes in groups of 32, and a larger error.
    rotate: quantise a decoder a second time with its hidden states turned (see rotation.py), and keep that plan when
        it loses less on held-out data. It helps wide groups and coarse activations.
    keep_float: names of layers that stay in float.
    work: a folder where "int4" keeps finished layers; a run that was cut short goes on from there and ends with
        the same plan, bit for bit. It is deleted when the plan is made.
    prune: share of the multiply-adds to remove first, by cutting whole channels of convolutions and columns of
        feed-forward layers; needs data. The plan's record says what was cut.
    distill: steps of distillation from the whole model after pruning (CNNs; 0: none).

    Raises ArgumentError for an unknown recipe or unusable data, UnsupportedError when a recipe does not apply
    to this kind of model.
    """
    if recipe not in (*RECIPES, "auto"):
        raise ArgumentError(f"recipe must be one of {', '.join(RECIPES)} or auto, got {recipe!r}")
    if kv_cache not in CACHES:
        raise ArgumentError(f"kv_cache must be float, int8 or int4, got {kv_cache!r}")
    if budget is not None and not 0 < budget < 1:
        raise ArgumentError(f"budget must lie between 0 and 1 (0.01 is one per cent), got {budget}")
    if distill < 0 or (distill and prune is None):
        raise ArgumentError(
            f"distill must be a number of steps that follow pruning, got {distill}; give prune too"
        )
    if recipe == "auto" and budget is None:
        raise ArgumentError("recipe auto needs a budget, such as 0.01")
    if objective not in OBJECTIVES:
        raise ArgumentError(f"objective must be {' or '.join(OBJECTIVES)}, got {objective!r}")
    if symmetric and recipe != "int4":
        raise ArgumentError(f"symmetric must be False for recipe {recipe}: only int4 has zero points")
    if prune is not None and recipe == "auto":
        raise ArgumentError("prune must be None for recipe auto: prune with a recipe that is named")
    if rotate and recipe == "auto":
        raise ArgumentError(
            "rotate must be False for recipe auto: name the recipe to be tried with and without"
        )
    _check_group_size(group_size)
    if resolve_device(device).type != "cpu":
        raise UnsupportedError("device must be cpu: plans are measured on the CPU, and run on any device")
    began = time.monotonic()
    imported, fused, held, report = _prepare(model, recipe, data, seed, options)
    need = preflight.predict(fused, imported.kind, recipe, held, group_size, time_it=False)
    preflight.refuse_without_memory(need.peak, need.available)
    progress = _tidy(progress)
    if recipe == "auto" and imported.kind in KINDS and budget is not None:
        if not held.held_out:
            raise ArgumentError("data must be given: recipe auto chooses by what it measures")
        plan = Search(
            imported.kind, fused, held, budget, objective, set(keep_float),
            lambda graph, decisions: _finish(imported, fused, held, graph, decisions, recipe, kv_cache),
            lambda plan: _certify(plan, fused, held), progress, work,
        ).run()  # fmt: skip
    else:
        only = "fp32" if recipe == "auto" else recipe  # nothing says what another kind of model loses
        start = fused if prune is None else _pruned(fused, held, prune, distill, progress)
        turned = rotation.turned(imported.kind, start, seed) if rotate else None
        plan = _compress(
            imported,
            fused,
            start,
            held,
            only,
            kv_cache,
            group_size,
            set(keep_float),
            progress,
            work,
            symmetric,
        )
        if turned is not None and only not in ("fp32", "native"):
            graph, names = turned
            other = _compress(
                imported, fused, graph, held, only, kv_cache, group_size, {*keep_float, *names}, progress, work,
                symmetric,
            )  # fmt: skip
            plan = rotation.better(plan, other)
    plan.record |= {"seconds": round(time.monotonic() - began, 2), "passes": str(report)}
    if budget is not None and plan.certificate["loss"] is not None and plan.certificate["loss"] > budget:
        raise UnsupportedError(
            f"recipe {recipe} loses {plan.certificate['loss']:.4g} on held-out data, more than the budget "
            f"{budget:.4g}; try recipe auto, int8-weight, or keep_float for the layers with the lowest SQNR"
        )
    return plan


def predict(
    model: Any,
    *,
    recipe: str = "int8",
    data: Any = None,
    group_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> preflight.Prediction:
    """What :func:`compress` with these arguments would make and need, without doing it.

    The model is imported and runs once. Bytes of the weights are exact, or a range where measurements have a say
    (which layers of a CNN stay in float; all of "auto"); seconds and memory are estimates.

    Raises as :func:`compress` does.
    """
    if recipe not in (*RECIPES, "auto"):
        raise ArgumentError(f"recipe must be one of {', '.join(RECIPES)} or auto, got {recipe!r}")
    _check_group_size(group_size)
    imported, fused, held, _ = _prepare(model, recipe, data, seed, options)
    return preflight.predict(fused, imported.kind, recipe, held, group_size)


def _check_group_size(size: int | None) -> None:
    if size is not None and (size < 0 or size % 32):
        raise ArgumentError(f"group_size must be a multiple of 32, got {size}")


def _prepare(
    model: Any, recipe: str, data: Any, seed: int, options: dict[str, Any]
) -> tuple[Model, Graph, Data, Any]:
    imported = load_model(model, **options)
    fused, report = optimize(Graph.from_exported(imported.exported, imported.native))
    held = Data(imported, fused, data, seed, search=recipe == "auto")
    _refuse_damaged(fused)
    return imported, fused, held, report


def _tidy(progress: Progress | None) -> Progress:
    """Progress that also gives memory back, so that what one step freed does not add to the next one's peak."""

    def tick(what: str, done: int, total: int) -> None:
        preflight.release()
        if progress is not None:
            progress(what, done, total)

    return tick


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


def _pruned(fused: Graph, data: Data, share: float, steps: int, progress: Progress | None) -> Graph:
    graph = fused.clone()
    data.pruning = prune_graph(graph, data.calibration, share, progress=progress)
    if steps:
        data.pruning["distillation"] = distill_graph(graph, fused, data.calibration, steps, progress)
    graph.native = {}  # the file's own codes are those of all channels
    return graph


def _compress(
    model: Model, fused: Graph, start: Graph, data: Data, recipe: str, kv_cache: str, group_size: int | None,
    keep_float: set[str], progress: Progress | None, work: str | Path | None, symmetric: bool,
) -> Plan:  # fmt: skip
    graph = start.clone()
    decisions = _apply(graph, model, data, recipe, group_size, keep_float, progress, work, symmetric)
    unknown = keep_float - {d.name for d in decisions}
    if unknown:
        names = ", ".join(sorted(d.name for d in decisions)[:8])
        raise ArgumentError(
            f"keep_float must name layers; there is no {sorted(unknown)[0]!r} (there are {names} ...)"
        )
    plan = _finish(model, fused, data, graph, decisions, recipe, kv_cache)
    _certify(plan, fused, data)
    return plan


def _finish(
    model: Model,
    fused: Graph,
    data: Data,
    graph: Graph,
    decisions: list[Decision],
    recipe: str,
    kv_cache: str,
) -> Plan:
    """The plan of a rewritten graph, without its certificate."""
    if kv_cache != "float":
        if model.kind != "decoder":
            raise ArgumentError(f"kv_cache must be float for a model of kind {model.kind}")
        shifts = common_keys(fused, data.calibration) if kv_cache == "int4" else ()
        quantize_kv_cache(graph, kv_cache, shifts)
    narrowed = narrow_attention(graph) if recipe in ("int8", "int4", "auto") else 0
    graph.clean()
    graph.fx.lint()
    graph.native = {}
    warnings = list(data.warnings)
    warnings += [f"layer {d.name}: {note}" for d in decisions for note in d.notes]
    plan = Plan(
        graph,
        model.kind,
        recipe,
        config=model.config,
        record={
            "recipe": recipe,
            "kv_cache": kv_cache,
            "bfloat16_attentions": narrowed,
            "layers": [d.as_dict() for d in decisions],
            "calibration_sha256": data.hash,
            "calibration_batches": len(data.calibration),
            "bytes_float32": fused.weight_bytes,
            "first_damping": DAMPING[0],
            "convolutions": data.about,
            "pruning": data.pruning,
            "warnings": warnings,
        },
        assets=model.assets,
        source=model.source,
    )
    return plan


def _refuse_damaged(graph: Graph) -> None:
    for name, weight in graph.weights.items():
        if weight.is_floating_point() and weight.isnan().any():
            raise ArgumentError(f"weight {name} holds NaN: the model is damaged")
    for node in graph.calls(ops.linear.default):  # masks and such may hold infinities
        name = Layer(node)["weight"].target
        if graph.weights[name].isinf().any():
            raise ArgumentError(f"weight {name} holds infinities: the model is damaged")


def _apply(
    graph: Graph, model: Model, data: Data, recipe: str, group_size: int | None, keep_float: set[str],
    progress: Progress | None, work: str | Path | None, symmetric: bool,
) -> list[Decision]:  # fmt: skip
    if recipe == "fp32":
        return []
    if recipe == "native" and not graph.native:
        raise UnsupportedError(
            "recipe native needs a file with its own quantised weights (GGUF, GPTQ, AWQ, compressed-tensors, "
            "bitsandbytes int8, HQQ, torchao, ONNX); values of a table (NF4) have no kernel: use int4"
        )
    if model.kind == "image" and recipe in ("int8", "int4"):
        if not data.calibration:
            raise ArgumentError("data must be given: static activation ranges of a CNN need pictures")
        decisions, data.about = quantize_cnn(graph, data.calibration, keep_float, progress, int(recipe[3:]))
    elif model.kind in ("image", "generic") and recipe not in ("int8", "native"):
        others = "int8, int4 or fp32" if model.kind == "image" else "int8 or fp32"
        raise UnsupportedError(f"recipe {recipe} is for language models and encoders; use {others}")
    else:
        decisions = []
    size = group_size or 32
    if recipe == "int4" and model.kind != "image" and data.calibration:
        return _int4(graph, data, size, keep_float, progress, work, symmetric)
    layers = list(graph.calls(ops.linear.default))
    needs_data = recipe != "native" and layers and data.calibration
    few = data.calibration[:STATISTICS_WINDOWS] if model.kind == "decoder" else data.calibration
    statistics = collect(graph, layers, few, data.valid, progress) if needs_data else {}
    if recipe == "int8" or (recipe == "int4" and model.kind == "image"):
        encoder = model.kind == "encoder"
        group = (32 if encoder else 64) if group_size is None or recipe == "int4" else group_size
        alphas = smooth(
            graph, {n: s for n, s in statistics.items() if layer_name(Layer(n)) not in keep_float}, group
        )
        # A decoder's int8 weights lose little by rounding to nearest, and its many tokens would take a minute.
        rounded = {}
        if encoder and data.calibration:
            rounded = round_in_sequence(
                graph, int8_targets(graph, group, keep_float), data.calibration + data.synthetic, data.valid,
                progress,
            )  # fmt: skip
        return decisions + quantize_int8(graph, statistics, group, keep_float, alphas, rounded)
    bits = 8 if recipe == "int8-weight" else 4
    # A file's own weights are run as they are, with 16-bit activations: nothing is lost but rounding.
    activation_bits = INT4_ACTIVATION_BITS if recipe == "int4" else 16
    return quantize_grouped(
        graph,
        statistics,
        bits,
        size,
        activation_bits,
        keep_float,
        native=recipe == "native",
        symmetric=symmetric,
    )


def _int4(
    graph: Graph, data: Data, group_size: int, keep_float: set[str], progress: Progress | None,
    work: str | Path | None, symmetric: bool,
) -> list[Decision]:  # fmt: skip
    targets = int4_targets(graph, group_size, INT4_ACTIVATION_BITS, keep_float, symmetric)
    folder = None
    if work is not None:
        about = {
            "version": __version__, "weights": fingerprint(graph.weights), "data": data.hash,
            "seed": data.seed, "batches": len(data.calibration), "group_size": group_size,
            "symmetric": symmetric, "layers": [t.name for t in targets.values()],
        }  # fmt: skip
        folder = WorkFolder(work, about)
    rounded = round_in_sequence(
        graph, targets, data.calibration + data.synthetic, data.valid, progress, folder
    )
    decisions = quantize_grouped(
        graph, {}, 4, group_size, INT4_ACTIVATION_BITS, keep_float, symmetric=symmetric, rounded=rounded
    )
    if folder is not None:
        folder.remove()
    return decisions


def _certify(plan: Plan, fused: Graph, data: Data) -> None:
    """Errors on data that calibration did not see: of the plan's own outputs, and of the model's metric."""
    plan.certificate = {
        "metrics": {}, "bounds": {}, "loss": None, "held_out": len(data.held_out), "data": None,
    }  # fmt: skip
    if not data.held_out:
        return
    exe = Executor(plan, device="cpu")
    held_out = data.held_out if plan.recipe == "auto" else data.held_out[: data.measured]
    results, errors = measure.compare(plan.kind, fused, exe, held_out)
    samples: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    if plan.kind == "decoder":
        ids = held_out[0][0][:, :64]
        reference = fused.run(*(x.clone() for x in decoder_inputs(fused, ids)))[0]
        samples = [((ids,), (reference.reshape(1, ids.shape[1], -1)[:, -4:],))]
    else:
        first = tuple(x[: data.sampled] for x in held_out[0])
        samples = [(first, fused.run(*first))]
    # The same measure on as much of the data that calibration saw tells whether it was learnt by heart.
    most = HELD_OUT_WINDOWS if plan.kind == "decoder" else min(len(held_out), MEASURED_BATCHES)
    few = data.calibration[:most] if plan.recipe in hygiene.CALIBRATED else []
    seen = measure.compare(plan.kind, fused, exe, few)[1] if few else None
    widest = _widest_rounded(plan, fused) if plan.recipe in ("int4", "auto") else 0
    plan.certificate["data"] = hygiene.describe(
        plan.kind, plan.recipe, data.calibration, data.held_out, (seen, errors), data.begin, widest
    )
    plan.record["warnings"] += plan.certificate["data"].get("warnings", [])
    plan.certificate["metrics"] = {name: m.value for name, m in results.items()}
    plan.certificate["bounds"] = {name: [m.low, m.high] for name, m in results.items()}
    if plan.kind in measure.MAIN:
        plan.certificate["loss"] = results[measure.MAIN[plan.kind]].loss
    certify(plan, samples)


def _widest_rounded(plan: Plan, fused: Graph) -> int:
    """Most inputs of a layer that GPTQ rounded for its calibration data."""
    names = {d["name"] for d in plan.record["layers"] if d["damping"] is not None}
    layers = [Layer(node) for node in fused.calls(ops.linear.default)]
    depths = [fused.weights[x["weight"].target].shape[1] for x in layers if layer_name(x) in names]
    return max(depths, default=0)
