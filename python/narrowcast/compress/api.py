"""``narrowcast.compress``: one call from a model to a plan with a certificate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from .calibrate import collect, decoder_inputs
from .calibration_data import HELD_OUT_WINDOWS, MEASURED_BATCHES, STATISTICS_WINDOWS, Data
from .cnn import quantize_cnn
from .cost import OBJECTIVES
from .cut_extremes import cut_extremes
from .distill import distill as distill_graph
from .gptq import DAMPING
from .half_attention import narrow_attention
from .kv_cache import KINDS as CACHES
from .kv_cache import common_keys, quantize_kv_cache
from .prune import prune_graph
from .search import KINDS, Search
from .sequential import round_in_sequence
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

#: For int4 the weights lose more than int8 activations in groups do, and products of integers are much faster.
INT4_ACTIVATION_BITS = 8
Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Options:
    """What :func:`compress` was asked for, see there."""

    recipe: str
    kv_cache: str = "float"
    group_size: int | None = None
    symmetric: bool = False
    rotate: bool = False
    keep_float: set[str] = field(default_factory=set)
    prune: float | None = None
    distill: int = 0
    work: str | Path | None = None
    progress: Progress | None = None

    def check(self) -> None:
        recipe = self.recipe
        if recipe not in (*RECIPES, "auto"):
            raise ArgumentError(f"recipe must be one of {', '.join(RECIPES)} or auto, got {recipe!r}")
        if self.kv_cache not in CACHES:
            raise ArgumentError(f"kv_cache must be float, int8 or int4, got {self.kv_cache!r}")
        if self.distill < 0 or (self.distill and self.prune is None):
            raise ArgumentError(
                f"distill must be a number of steps that follow pruning, got {self.distill}; give prune too"
            )
        if self.symmetric and recipe != "int4":
            raise ArgumentError(f"symmetric must be False for recipe {recipe}: only int4 has zero points")
        if self.prune is not None and recipe == "auto":
            raise ArgumentError("prune must be None for recipe auto: prune with a recipe that is named")
        if self.rotate and recipe == "auto":
            raise ArgumentError(
                "rotate must be False for recipe auto: name the recipe to be tried with and without"
            )
        if self.group_size is not None and (self.group_size < 0 or self.group_size % 32):
            raise ArgumentError(f"group_size must be a multiple of 32, got {self.group_size}")


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
    asked = Options(
        recipe, kv_cache, group_size, symmetric, rotate, set(keep_float), prune, distill, work, _tidy(progress)
    )  # fmt: skip
    asked.check()
    if budget is not None and not 0 < budget < 1:
        raise ArgumentError(f"budget must lie between 0 and 1 (0.01 is one per cent), got {budget}")
    if recipe == "auto" and budget is None:
        raise ArgumentError("recipe auto needs a budget, such as 0.01")
    if objective not in OBJECTIVES:
        raise ArgumentError(f"objective must be {' or '.join(OBJECTIVES)}, got {objective!r}")
    if resolve_device(device).type != "cpu":
        raise UnsupportedError("device must be cpu: plans are measured on the CPU, and run on any device")
    began = time.monotonic()
    imported, fused, held, report = _prepare(model, recipe, data, seed, options)
    need = preflight.predict(
        fused,
        imported.kind,
        recipe,
        held,
        group_size,
        time_it=False,
        prune=prune is not None,
        distill=distill,
    )
    preflight.refuse_without_memory(need.peak, need.available)
    if recipe == "auto" and imported.kind in KINDS and budget is not None:
        if not held.held_out:
            raise ArgumentError("data must be given: recipe auto chooses by what it measures")
        plan = Search(
            imported.kind, fused, held, budget, objective, set(keep_float),
            lambda graph, decisions: _finish(imported, fused, held, graph, decisions, recipe, kv_cache),
            lambda plan: _certify(plan, fused, held), asked.progress, work,
        ).run()  # fmt: skip
    else:
        # Nothing says what another kind of model loses.
        asked = replace(asked, recipe="fp32") if recipe == "auto" else asked
        start = fused if prune is None else _pruned(fused, held, prune, distill, asked.progress)
        turned = rotation.turned(imported.kind, start, seed) if rotate else None
        plan = _compress(imported, fused, start, held, asked)
        if turned is not None and recipe not in ("fp32", "native"):
            graph, names = turned
            kept = replace(asked, keep_float={*keep_float, *names})
            plan = rotation.better(plan, _compress(imported, fused, graph, held, kept))
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
    symmetric: bool = False,
    rotate: bool = False,
    keep_float: Sequence[str] = (),
    seed: int = 0,
    prune: float | None = None,
    distill: int = 0,
    **options: Any,
) -> preflight.Prediction:
    """What :func:`compress` with these arguments would make and need, without doing it.

    The model is imported and runs once. Bytes of the weights are exact, or a range where measurements have a say
    (which layers of a CNN stay in float or at 8 bits, which channels are cut, all of "auto"); seconds and memory are
    estimates.

    Raises as :func:`compress` does.
    """
    Options(recipe, "float", group_size, symmetric, rotate, set(keep_float), prune, distill).check()
    imported, fused, held, _ = _prepare(model, recipe, data, seed, options)
    starts = [fused] if prune is None else cut_extremes(fused, held.calibration, prune)
    variants = [(graph, set(keep_float)) for graph in starts]
    if rotate:
        for graph in starts:
            other, names = rotation.turned(imported.kind, graph, seed)
            variants.append((other, {*keep_float, *names}))
    return preflight.predict(
        fused, imported.kind, recipe, held, group_size, symmetric=symmetric, variants=variants,
        prune=prune is not None, distill=distill, rotate=rotate,
    )  # fmt: skip


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


def _pruned(fused: Graph, data: Data, share: float, steps: int, progress: Progress | None) -> Graph:
    graph = fused.clone()
    data.pruning = prune_graph(graph, data.calibration, share, progress=progress)
    if steps:
        data.pruning["distillation"] = distill_graph(graph, fused, data.calibration, steps, progress)
    graph.native = {}  # the file's own codes are those of all channels
    return graph


def _compress(model: Model, fused: Graph, start: Graph, data: Data, options: Options) -> Plan:
    graph = start.clone()
    decisions = _apply(graph, model, data, options)
    unknown = options.keep_float - {d.name for d in decisions}
    if unknown:
        names = ", ".join(sorted(d.name for d in decisions)[:8])
        raise ArgumentError(
            f"keep_float must name layers; there is no {sorted(unknown)[0]!r} (there are {names} ...)"
        )
    plan = _finish(model, fused, data, graph, decisions, options.recipe, options.kv_cache)
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


def _apply(graph: Graph, model: Model, data: Data, options: Options) -> list[Decision]:
    recipe, group_size, keep_float = options.recipe, options.group_size, options.keep_float
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
        decisions, data.about = quantize_cnn(
            graph, data.calibration, keep_float, options.progress, int(recipe[3:])
        )
    elif model.kind in ("image", "generic") and recipe not in ("int8", "native"):
        others = "int8, int4 or fp32" if model.kind == "image" else "int8 or fp32"
        raise UnsupportedError(f"recipe {recipe} is for language models and encoders; use {others}")
    else:
        decisions = []
    size = group_size or 32
    if recipe == "int4" and model.kind != "image" and data.calibration:
        return _int4(graph, data, size, options)
    layers = list(graph.calls(ops.linear.default))
    needs_data = recipe != "native" and layers and data.calibration
    few = data.calibration[:STATISTICS_WINDOWS] if model.kind == "decoder" else data.calibration
    statistics = collect(graph, layers, few, data.valid, options.progress) if needs_data else {}
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
                options.progress,
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
        symmetric=options.symmetric,
    )


def _int4(graph: Graph, data: Data, group_size: int, options: Options) -> list[Decision]:
    keep_float, symmetric = options.keep_float, options.symmetric
    targets = int4_targets(graph, group_size, INT4_ACTIVATION_BITS, keep_float, symmetric)
    folder = None
    if options.work is not None:
        about = {
            "version": __version__, "weights": fingerprint(graph.weights), "data": data.hash,
            "seed": data.seed, "batches": len(data.calibration), "group_size": group_size,
            "symmetric": symmetric, "layers": [t.name for t in targets.values()],
        }  # fmt: skip
        folder = WorkFolder(options.work, about)
    rounded = round_in_sequence(
        graph, targets, data.calibration + data.synthetic, data.valid, options.progress, folder
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
