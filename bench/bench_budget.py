"""Recipe "auto" on three models, three budgets and three seeds: is each plan inside its budget, and how small is it?

The loss is that on the final part of the data, which the search neither calibrated on nor chose by; "elsewhere" is
that on data from other sources (sentences from other books and languages, other photographs). Bytes are those of the
weights, beside the uniform int8 plan of the same model. What a search measures of a model (sensitivities) is shared
by the budgets of one seed; "seconds" are those of a budget without it. Not a timing: run it at any load.

    python bench/bench_budget.py [minilm efficientnet smollm2 smollm2-requantised] [--seeds 3]

"smollm2-requantised" hides the file's own codes, as if the model had come in float32. Writes
bench/results/budget.json, rows of other models stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "demo"))

import models  # noqa: E402
import torch  # noqa: E402

import narrowcast as nc  # noqa: E402
from narrowcast.compress import api, preflight  # noqa: E402
from narrowcast.compress import metrics as measure  # noqa: E402
from narrowcast.compress.calibrate import text_batches  # noqa: E402
from narrowcast.compress.data import plain_tokenizer  # noqa: E402
from narrowcast.compress.search import Search  # noqa: E402
from narrowcast.importers.model import load_model  # noqa: E402

BUDGETS = (0.005, 0.01, 0.02)
MODELS = ("minilm", "efficientnet", "smollm2", "smollm2-requantised")
PICTURES = 1200
OUT = ROOT / "bench" / "results" / "budget.json"


def load(name: str):
    model = load_model(getattr(models, name.split("-")[0])())
    return dataclasses.replace(model, native={}) if name.endswith("requantised") else model


def data_of(name: str, model, seed: int):
    if name == "efficientnet":
        return models.crops(models.pictures()[0], PICTURES, seed, model.config)
    return (models.DATA / ("persuasion.txt" if name == "minilm" else "emma.txt")).read_text()


def elsewhere(name: str, model, graph, plan, seed: int) -> float | None:
    """Loss on data of another source."""
    if name == "minilm":
        batches = text_batches(models.sentences(), plain_tokenizer(model.assets), 256, 16)
    elif name == "efficientnet":
        pictures = models.crops(list(models.pictures()[1].values()), 200, 100 + seed, model.config)
        batches = [(x,) for x in pictures.split(16)]
    else:
        return None
    results, _ = measure.compare(plan.kind, graph, nc.Executor(plan, device="cpu"), batches)
    return results[measure.MAIN[plan.kind]].loss


def sweep(name: str, seeds: int) -> list[dict]:
    model, rows = load(name), []
    for seed in range(seeds):
        began = time.monotonic()
        imported, fused, data, _ = api._prepare(model, "auto", data_of(name, model, seed), seed, {})
        int8 = preflight.bytes_of(fused, imported.kind, "int8", None)[0]
        search = Search(
            imported.kind, fused, data, BUDGETS[0], "bytes", set(),
            lambda graph, decisions: api._finish(imported, fused, data, graph, decisions, "auto", "float"),  # noqa: B023
            lambda plan: api._certify(plan, fused, data),  # noqa: B023
        )  # fmt: skip
        search.price()
        shared = time.monotonic() - began
        for budget in BUDGETS:
            began = time.monotonic()
            search.budget = budget
            plan = search.run()
            seconds = time.monotonic() - began
            found = plan.record["search"]
            last = [t for t in found["plans"] if t["bound"] <= budget]
            row = {
                "model": name, "seed": seed, "budget": budget, "loss": plan.certificate["loss"],
                "bounds_95": plan.certificate["bounds"][measure.MAIN[plan.kind]],
                "selected_loss": last[-1]["loss"] if last else 0.0, "bound": last[-1]["bound"] if last else 0.0,
                "inside": plan.certificate["loss"] <= budget, "looks": found["looks_at_final_part"],
                "elsewhere": elsewhere(name, model, fused, plan, seed),
                "bytes": plan.weight_bytes, "bytes_int8": int8, "saved": 1 - plan.weight_bytes / int8,
                "bytes_float32": fused.weight_bytes, "plans": len(found["plans"]),
                "precisions": dict(Counter(d["precision"] for d in plan.record["layers"])),
                "seconds": round(seconds, 1), "seconds_shared": round(shared, 1),
            }  # fmt: skip
            rows.append(row)
            write(name, rows)
            print(
                f"{name:20s} seed {seed} budget {budget:.3f} loss {row['loss']:.5f} bound {row['bound']:.5f} "
                f"{row['bytes'] / 1e6:7.2f} MB, int8 {int8 / 1e6:7.2f} MB, {row['saved']:+.1%} saved, looks "
                f"{row['looks']}, {row['plans']} plans, {seconds:.0f} s after {shared:.0f} s",
                flush=True,
            )
    return rows


def write(name: str, rows: list[dict]) -> None:
    """After every row: a sweep takes long."""
    known = json.loads(OUT.read_text()) if OUT.is_file() else []
    kept = [row for row in known if row.get("model") not in (name, None)]
    machine = {"machine": {"torch": torch.__version__, "kernels": torch.ops.narrowcast._isa()}}
    OUT.write_text(json.dumps([machine, *kept, *rows], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS[:3], help=", ".join(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in MODELS:
            parser.error(f"models must be of {', '.join(MODELS)}, got {name}")
        sweep(name, arguments.seeds)
    inside = sum(row["inside"] for row in json.loads(OUT.read_text())[1:])
    print(f"{inside} inside their budget")


if __name__ == "__main__":
    main()
