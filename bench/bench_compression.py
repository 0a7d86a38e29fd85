"""Compression beside other tools: the same float model, the same calibration data, the same held-out data and metrics.

    python bench/bench_compression.py [--part encoder|image|decoder] [--only TEXT] [--quick] [--latency]

What is measured is the tool's own compressed model in the tool's own engine, against the same weights in float32.
"share of nearest" is the loss beside that of the same format with every weight rounded to the nearest code of its
group's whole range. Seconds of ours hold the import, the passes and the measurement of the certificate; those of the
others do not hold the conversion to their format. Writes bench/results/compression.json after every row, rows of
other parts stay. --latency times what the rows hold, interleaved, and leaves their accuracy as it was: run it alone.
--quick: fewer held-out texts, pictures and windows, nothing is written. Absent tools are rows that say so; torchao
may lie outside the environment, in a folder on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.disable(logging.WARNING)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "demo")]

import models  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import harness  # noqa: E402
import held_out_texts  # noqa: E402
import narrowcast  # noqa: E402
from compression_table import accuracy_shown, show  # noqa: E402
from narrowcast.compress import metrics  # noqa: E402
from narrowcast.compress.calibrate import text_batches, token_windows  # noqa: E402
from narrowcast.compress.data import plain_tokenizer, sentences  # noqa: E402
from narrowcast.files import atomic_path  # noqa: E402
from narrowcast.importers.model import load_model  # noqa: E402
from nearest import nearest_plan  # noqa: E402
from peers import Engine, Recipe, Stopwatch, Task, Unsupported, compressors  # noqa: E402

OUT = harness.RESULTS / "compression.json"
#: The loss that a format is judged by, by part.
LOSS = {
    "encoder": lambda a: 1 - a["English"]["cosine"],
    "image": lambda a: a["kl"],
    "decoder": lambda a: a["kl"],
}


@dataclass
class Part:
    """A model, what tools may calibrate on, how a compressed one is measured, and the inputs it is timed on."""

    model: str
    task: Task
    ours: list[Recipe]
    accuracy: Callable[[Engine], dict[str, Any]]
    cases: dict[str, tuple[Tensor, ...]]
    bytes_float32: int
    #: recipe of ours -> the recipe of the same format rounded to nearest
    formats: dict[str, str] = field(default_factory=dict)


def our_engine(name: str, make: Callable[[], narrowcast.Plan], threads: int, whole: bool = False) -> Engine:
    """whole: logits of every position, for a decoder."""
    clock = Stopwatch()
    plan = make()
    spent = clock.read()
    executor = narrowcast.Executor(plan, device="cpu", threads=threads)
    run = executor.logits if whole else executor
    return Engine(f"narrowcast {name}", lambda *i: lambda: run(*i), bytes=plan.weight_bytes, **spent)


def our_recipes(model, data, offered: Mapping[str, dict], threads: int, whole: bool = False) -> list[Recipe]:
    """By the arguments of ``compress``, or those of ``nearest_plan`` where "nearest" is given."""

    def recipe(name: str, options: dict) -> Recipe:
        options = dict(options)
        if options.pop("nearest", False):
            return Recipe(
                "nearest",
                name,
                lambda: our_engine(name, lambda: nearest_plan(model, **options), threads, whole),
            )
        make = lambda: narrowcast.compress(model, data=data, **options)  # noqa: E731
        return Recipe("narrowcast", name, lambda: our_engine(name, make, threads, whole))

    return [recipe(name, options) for name, options in offered.items()]


def rounded(results: Mapping[str, metrics.Metric], names: Sequence[str]) -> dict[str, Any]:
    """Values with their 95 % bounds."""
    shown = {n: results[n] for n in names if n in results}
    values: dict[str, Any] = {n: float(f"{m.value:.6g}") for n, m in shown.items()}
    return values | {"bounds_95": {n: [float(f"{x:.6g}") for x in (m.low, m.high)] for n, m in shown.items()}}


# --- the three parts ------------------------------------------------------------------------------


def encoder(options) -> Part:
    path = models.minilm()
    model = load_model(path)
    text = (models.DATA / "emma.txt").read_text()
    tokenizer = plain_tokenizer(model.assets)
    calibration = [tuple(b) for b in text_batches(sentences([text], 256), tokenizer, 256, 1)]
    english = models.sentences()[16:] + sentences([(models.DATA / "persuasion.txt").read_text()], 100)
    sets = {
        "English": english, "code": held_out_texts.CODE, "Spanish": held_out_texts.SPANISH,
        "SQL": held_out_texts.SQL,
    }  # fmt: skip
    sets = {name: texts[:: 4 if options.quick else 1] for name, texts in sets.items()}
    batches = {name: text_batches(texts, tokenizer, 256, 1) for name, texts in sets.items()}
    bert = _Hidden(models.torch_bert(path)).eval().requires_grad_(False)

    def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
        if hidden.dim() == 2:  # ours ends with the pooling
            return hidden
        mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1)

    def vectors(run, batches) -> Tensor:
        return torch.cat([pooled(run(*b), b[1]) for b in batches])

    expected = {name: vectors(bert, b) for name, b in batches.items()}

    def accuracy(engine: Engine) -> dict[str, Any]:
        run = lambda *inputs: engine.prepare(*inputs)()  # noqa: E731
        return {
            name: rounded(metrics.encoder_metrics(expected[name], vectors(run, b)), ("cosine", "cosine_min"))
            for name, b in batches.items()
        }

    offered = {
        "int8": {"recipe": "int8"},
        "int4 g64": {"recipe": "int4", "group_size": 64},
        "int4 g32": {"recipe": "int4"},
        "int4 g64 nearest": {"nearest": True, "group_size": 64},
        "int4 g32 nearest": {"nearest": True, "group_size": 32},
    }
    ids = {f"{b}x{s}": torch.randint(1000, 20000, (b, s)) for b, s in ((1, 32), (8, 128))}
    return Part(
        "MiniLM-L6", Task(bert, path, calibration, options.threads),
        our_recipes(model, text, offered, options.threads), accuracy,
        {name: (x, torch.ones_like(x)) for name, x in ids.items()},
        sum(p.nbytes for p in bert.parameters()),
        {"int4 g64": "int4 g64 nearest", "int4 g32": "int4 g32 nearest"},
    )  # fmt: skip


def image(options) -> Part:
    path = models.efficientnet()
    model = load_model(path)
    pictures, test = models.pictures()
    calibration = models.crops(pictures, 100, 1, model.config)
    crops = models.crops(list(test.values()), 80 if options.quick else 400, 2, model.config)
    module = models.torch_efficientnet(path)
    expected = torch.cat([module(x) for x in crops.split(16)])

    def accuracy(engine: Engine) -> dict[str, Any]:
        got = torch.cat([engine.prepare(x)().float() for x in crops.split(16)])
        names = ("agreement", "agreement_confident", "kl")
        return rounded(metrics.image_metrics(expected, got), names)

    offered = {
        "int8": {"recipe": "int8"},
        "int4": {"recipe": "int4"},
        "int4 nearest": {"nearest": True, "data": calibration},
    }
    return Part(
        "EfficientNet-Lite0", Task(module, path, [(x[None],) for x in calibration], options.threads),
        our_recipes(model, calibration, offered, options.threads), accuracy,
        {f"batch {b}": (crops[:b],) for b in (1, 16)}, sum(p.nbytes for p in module.parameters()),
        {"int4": "int4 nearest"},
    )  # fmt: skip


def decoder(options) -> Part:
    path = models.smollm2()
    model = load_model(path)
    text = (models.DATA / "emma.txt").read_text()
    tokenizer, bos = plain_tokenizer(model.assets), model.config.get("bos_token_id")
    calibration = [(w,) for w in token_windows(text, tokenizer, bos, 512, 24)]
    held_out = (models.DATA / "persuasion.txt").read_text()
    windows = token_windows(held_out, tokenizer, bos, 512, 4 if options.quick else 40)
    module = _Logits(models.torch_llama(model)).eval().requires_grad_(False)
    # Half of a window is scored, and only that half of the logits is kept.
    expected = [module(w)[0, w.shape[1] // 2 :].clone() for w in windows]

    def accuracy(engine: Engine) -> dict[str, Any]:
        scores = metrics.DecoderMetrics()
        for window, reference in zip(windows, expected):
            half = window.shape[1] // 2
            logits = engine.prepare(window)()[0]
            scores.add(window[0], _behind(half, reference), logits)
        names = ("perplexity_increase", "kl", "same_top1")
        return rounded(scores.results(), names) | {"tokens": scores.scored}

    four = {
        f"int4 g{g}{' sym' if s else ''}": {"group_size": g, "symmetric": s}
        for g in (32, 64)
        for s in (False, True)
    }
    offered = {
        "int8": {"recipe": "int8"},
        "float32 + int8 cache": {"recipe": "fp32", "kv_cache": "int8"},
        **{name: {"recipe": "int4", **o} for name, o in four.items()},
        **{f"{name} nearest": {"nearest": True, **o} for name, o in four.items()},
    }
    return Part(
        "SmolLM2-135M", Task(module, path, calibration, options.threads),
        our_recipes(model, text, offered, options.threads, whole=True), accuracy,
        {"prefill 256": (windows[0][:, :256],)}, sum(p.nbytes for p in module.parameters()),
        {name: f"{name} nearest" for name in four},
    )  # fmt: skip


class _Hidden(torch.nn.Module):
    """An encoder that takes ids and mask and returns the last hidden state alone, as every exporter likes it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


class _Logits(torch.nn.Module):
    """A decoder without a cache: ids in, logits of every position out. Its mask is made here, as exporters stumble
    over how transformers makes it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids):
        size = ids.shape[1]
        mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _behind(count: int, rows: Tensor) -> Tensor:
    """``rows`` after ``count`` rows that nobody reads."""
    return torch.cat((rows[:1].expand(count, -1), rows))


# --- rows -----------------------------------------------------------------------------------------


def short(error: Exception) -> str:
    """The first line of an error, for a row."""
    text = str(error).strip().splitlines()
    kind = "" if isinstance(error, Unsupported | ImportError) else f"{type(error).__name__}: "
    return (kind + (text[0] if text else ""))[:160]


def measured(part: Part, recipe: Recipe) -> dict[str, Any]:
    """A row: what the recipe made, or why it made nothing."""
    row = {"model": part.model, "tool": recipe.tool, "recipe": recipe.name}
    try:
        engine = recipe.make()
        accuracy = part.accuracy(engine)
    except Exception as error:
        return row | {"reason": short(error)}
    return row | {
        "accuracy": accuracy, "seconds": round(engine.seconds, 1), "cpu_seconds": round(engine.cpu_seconds, 1),
        "bytes": engine.bytes, "bytes_float32": part.bytes_float32, "note": engine.note,
    }  # fmt: skip


def with_shares(
    rows: Sequence[dict], formats: Mapping[str, str], loss: Callable[[dict], float]
) -> list[dict]:
    """The rows; one of ours also says what share of the loss of rounding to nearest it has."""
    of = {
        row["recipe"]: row for row in rows if row["tool"] in ("narrowcast", "nearest") and "accuracy" in row
    }
    result = []
    for row in rows:
        plain = of.get(formats.get(row["recipe"], "")) if row["tool"] == "narrowcast" else None
        if plain is not None and "accuracy" in row:
            whole = loss(plain["accuracy"])
            share = loss(row["accuracy"]) / whole if whole > 0 else math.inf
            row = row | {"share_of_nearest": round(share, 4)}
        result.append(row)
    return result


def latencies(part: Part, rows: Sequence[dict], recipes: Sequence[Recipe], seconds: float) -> list[dict]:
    """The rows with milliseconds of every case, all engines interleaved, and seconds to compress of this run."""
    engines: dict[str, Engine] = {}
    known = {(row["tool"], row["recipe"]): dict(row) for row in rows}
    for recipe in recipes:
        row = known.get((recipe.tool, recipe.name), {"reason": "not measured"})
        if "reason" not in row and recipe.tool != "nearest":
            engine = engines[recipe.name + "\0" + recipe.tool] = recipe.make()
            row |= {"seconds": round(engine.seconds, 1), "cpu_seconds": round(engine.cpu_seconds, 1)}
    for case, inputs in part.cases.items():
        calls = {}
        for key, engine in engines.items():
            try:
                call = (engine.timed or engine.prepare)(*inputs)
                call()
                calls[key] = call
            except Exception as error:
                print(f"left out of {case}: {engine.name} ({short(error)})")
        times = harness.measure(calls, seconds=seconds * len(calls), rounds=9)
        for key, timing in times.items():
            name, tool = key.split("\0")
            row = known[tool, name]
            row.setdefault("latency_ms", {})[case] = round(timing * 1e3, 4)
            row.setdefault("latency_spread", {})[case] = round(timing.spread, 3)
    return list(known.values())


def facts(threads: int) -> dict[str, Any]:
    """What the rows were measured on, without the rates that only a quiet machine has."""
    import importlib.metadata as installed

    versions = {}
    for name in ("torch", "onnxruntime", "openvino", "nncf", "torchao", "llama_cpp_python"):
        try:
            versions[name] = installed.version(name)
        except installed.PackageNotFoundError:
            versions[name] = None
    from narrowcast.runtime.threads import cpu_name

    return {
        "room": "machine", "cpu": cpu_name(), "isa": torch.ops.narrowcast._isa(),
        "cores": len(os.sched_getaffinity(0)), "threads": threads, "versions": versions,
    }  # fmt: skip


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())[1:] if path.is_file() else []


def write(model: str, rows: Sequence[dict], about: dict, path: Path) -> None:
    """The rows of one model; those of others, which another run may have written meanwhile, stay."""
    others = [row for row in read(path) if row["model"] != model]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps([about, *others, *rows], indent=1) + "\n")


PARTS = {"encoder": encoder, "image": image, "decoder": decoder}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--only", help="recipes whose tool and name hold this text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=OUT, help="where rows are read and written")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for name in options.part or PARTS:
        part = PARTS[name](options)
        recipes = [*part.ours, *compressors(name, part.task)]
        rows = [row for row in read(options.json) if row["model"] == part.model]
        if options.latency:
            rows = latencies(part, rows, recipes, 0.4 if options.quick else 2.0)
        else:
            done = {(row["tool"], row["recipe"]): row for row in rows}
            order = [(recipe.tool, recipe.name) for recipe in recipes]
            for recipe in recipes:
                if options.only and options.only not in f"{recipe.tool} {recipe.name}":
                    continue
                row = measured(part, recipe)
                gc.collect()
                shown = accuracy_shown(row["accuracy"]) if "accuracy" in row else [row["reason"]]
                print(part.model, recipe.tool, recipe.name, *shown, row.get("cpu_seconds", ""), flush=True)
                done[recipe.tool, recipe.name] = row
                rows = [done[key] for key in order if key in done]
                rows = with_shares(rows, part.formats, LOSS[name])
                if not options.quick:
                    write(part.model, rows, facts(options.threads), options.json)
        if not options.quick:
            about = (harness.machine() if options.latency else {}) | facts(options.threads)
            write(part.model, rows, about, options.json)
        show(rows)


if __name__ == "__main__":
    main()
