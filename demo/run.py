"""``make demo``: three real models compressed, run on real input, measured, and compared with torch.

Writes build/demo.json and the plans to build/plans.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import models  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import narrowcast  # noqa: E402
from narrowcast.compress.calibrate import text_batches, token_windows  # noqa: E402
from narrowcast.compress.evaluation import decoder_scores, float_plan  # noqa: E402
from narrowcast.importers.model import load_model  # noqa: E402
from narrowcast.runtime.timing import measure  # noqa: E402

console = Console(highlight=False, width=max(Console().width, 150))
ROOT = Path(__file__).parents[1]
PLANS = ROOT / "build" / "plans"
WINDOWS = int(os.environ.get("DEMO_WINDOWS", "40"))
ROUNDS = 7
began = time.monotonic()


def say(text: str) -> None:
    console.print(f"[dim]{time.monotonic() - began:5.0f} s[/dim]  {text}")


def row(model, recipe, case, sizes, metric, value, reference, unit, bounds, results, times, threads) -> dict:
    """One line of the table and of build/demo.json. results: all that was measured, with its bounds."""
    peers = {name: t for name, t in times.items() if name != "narrowcast"}
    fastest = min(peers, key=lambda name: peers[name]["median"])
    ours = times["narrowcast"]
    return {
        "model": model, "recipe": recipe, "case": case,
        "bytes_before": sizes[0], "bytes_file": sizes[1], "bytes_after": sizes[2],
        "metric": metric, "value": value, "reference": reference, "unit": unit, "bounds_95": bounds,
        "accuracy": {name: [r.value, r.low, r.high] for name, r in results.items()},
        "ms": ours["median"], "ms_spread": [ours["low"], ours["high"]],
        "ms_torch_fp32": times["torch fp32"]["median"], "ms_torch_best": peers[fastest]["median"], "torch_best": fastest,
        "threads": threads, "device": f"cpu ({torch.ops.narrowcast._isa()})",
    }  # fmt: skip


def compiled(module, *inputs):
    """torch.compile of a module, or None where it does not work (no compiler)."""
    try:
        result = torch.compile(module)
        with torch.inference_mode():
            result(*inputs)
        return result
    except Exception as error:
        say(f"torch.compile is left out: {str(error).splitlines()[0][:100]}")
        return None


def source_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.suffix == ".safetensors"]
    return sum(p.stat().st_size for p in files)


def save(plan, name: str):
    """(executor of the saved file, its bytes): what is measured is what was written."""
    path = PLANS / f"{name}.plan"
    plan.save(path)
    return narrowcast.load(path, device="cpu"), path.stat().st_size


# --- a language model -----------------------------------------------------------------------------


def language_model() -> list[dict]:
    path = models.smollm2()
    say(f"[bold]SmolLM2-135M[/bold] from {path.name}")
    model = load_model(path)
    text = (models.DATA / "emma.txt").read_text()
    executors, sizes = {}, {}
    for name, options in {
        "native": {"recipe": "native"},
        "int8": {"recipe": "int8"},
        "int8 + int8 cache": {"recipe": "int8", "kv_cache": "int8"},
        "int4": {"recipe": "int4"},
    }.items():
        start = time.monotonic()
        if name == "int8 + int8 cache":
            from narrowcast.compress.kv_cache import quantize_kv_cache

            plan = narrowcast.Plan.load(PLANS / "smollm2-int8.plan")
            quantize_kv_cache(plan.graph)
        else:
            plan = narrowcast.compress(model, data=text, **options)
        executors[name], sizes[name] = save(plan, "smollm2-" + name.replace(" + ", "-").replace(" ", "-"))
        say(f"  {name}: {sizes[name] / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")

    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    for name in ("int8", "int4"):
        answer = "".join(executors[name].generate(prompt, max_new_tokens=32)).strip()
        console.print(f"         [green]{name}[/green] {prompt[0]['content']} -> {answer}")

    say(f"  measuring on {WINDOWS} windows of Persuasion (calibrated on Emma)")
    float32 = float_plan(model)
    tokenizer = executors["int8"].decoder.tokenizer
    bos = model.config.get("bos_token_id")
    windows = token_windows((models.DATA / "persuasion.txt").read_text(), tokenizer, bos, 512, WINDOWS)
    scores = decoder_scores(executors, windows, narrowcast.Executor(float32, device="cpu"), "float32")
    results = {name: s.results() for name, s in scores.items()}
    for name, r in results.items():
        console.print(
            f"         {name}: {r['perplexity_increase']}, {r['kl']}, {r['same_top1']}, {scores[name].scored} tokens"
        )

    say("  timing beside torch")
    llama = models.torch_llama(model)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    ids = windows[0]
    prefill_peers = {
        "torch fp32": lambda: llama(ids, logits_to_keep=1),
        "torch bf16": lambda: half(ids, logits_to_keep=1),
    }
    decode_peers = {
        "torch fp32": _decoder_step(llama, ids[:, :64]),
        "torch bf16": _decoder_step(half, ids[:, :64]),
    }
    rows = []
    for name, exe in executors.items():
        r = results[name]["perplexity_increase"]
        common = ("SmolLM2-135M", name)
        figures = (
            "perplexity increase",
            r.value,
            results[name]["perplexity_float32"].value,
            "relative",
            [r.low, r.high],
            results[name],
        )
        size = (float32.weight_bytes, source_bytes(path), sizes[name])
        times = measure({"narrowcast": _our_step(exe, ids[:, :64]), **decode_peers}, ROUNDS, inner=8)
        rows.append(row(*common, "decode", size, *figures, times, exe.threads))
        times = measure({"narrowcast": _our_prefill(exe, ids), **prefill_peers}, 5)
        rows.append(row(*common, "prefill_512", size, *figures, times, exe.threads))
    return rows


def _decoder_step(llama, prompt):
    """One greedy token after a cached prompt; the cache is cut back after each call."""
    with torch.inference_mode():
        out = llama(prompt, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    token = out.logits[:, -1].argmax(-1, keepdim=True)

    def step():
        logits = llama(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(-1)
        return logits[:, -1].argmax(-1)

    return step


def _our_step(exe, prompt):
    inputs = _cached(exe, prompt.shape[1] + 64)
    exe(prompt, torch.zeros(1, dtype=torch.int32), torch.tensor([prompt.shape[1] - 1]), *inputs)
    token, start, last = (
        torch.tensor([[11]]),
        torch.tensor([prompt.shape[1]], dtype=torch.int32),
        torch.tensor([0]),
    )
    return lambda: exe(token, start, last, *inputs).argmax(-1)


def _our_prefill(exe, ids):
    inputs = _cached(exe, ids.shape[1])
    start, last = torch.zeros(1, dtype=torch.int32), torch.tensor([ids.shape[1] - 1])
    return lambda: exe(ids, start, last, *inputs)


def _cached(exe, capacity):
    from narrowcast.runtime.cache import KVCache

    return KVCache(exe.cache_layout(), 1, capacity, torch.device("cpu")).tensors


# --- an encoder -----------------------------------------------------------------------------------


def encoder() -> list[dict]:
    path = models.minilm()
    say("[bold]MiniLM-L6[/bold] sentence embeddings")
    model = load_model(path)
    start = time.monotonic()
    plan = narrowcast.compress(model, recipe="int8", data=(models.DATA / "emma.txt").read_text())
    exe, size = save(plan, "minilm-int8")
    say(f"  int8: {size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")

    query = "The cat sleeps on the sofa."
    others = [
        "A kitten is napping on the couch.",
        "Stock markets fell sharply on Monday.",
        "El perro corre por la playa.",
    ]
    vectors = exe.encode([query, *others])
    ranked = sorted(zip((vectors[1:] @ vectors[0]).tolist(), others), reverse=True)
    console.print(f"         [green]{query}[/green] " + "; ".join(f"{s:.2f} {t}" for s, t in ranked))

    float32, test = float_plan(model), models.sentences()
    r = narrowcast.evaluate(exe, test, float32, device="cpu").metrics
    console.print(f"         {r['cosine']}, {r['cosine_min']}, {len(test)} sentences")

    bert = models.torch_bert(path)
    half = copy.deepcopy(bert).to(torch.bfloat16)
    rows = []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(model.assets["tokenizer.json"].decode())
    tokenizer.no_padding()
    for case, batch, length in (("1x32", 1, 32), ("8x128", 8, 128)):
        text = " ".join(test)
        ids = text_batches([text[i * 400 :] for i in range(batch)], tokenizer, length, batch)[0][0]
        mask = torch.ones_like(ids)
        calls = {
            "narrowcast": lambda ids=ids, mask=mask: exe(ids, mask),
            "torch fp32": lambda ids=ids, mask=mask: bert(input_ids=ids, attention_mask=mask),
            "torch bf16": lambda ids=ids, mask=mask: half(input_ids=ids, attention_mask=mask),
        }
        fast = compiled(bert, ids, mask)
        if fast is not None:
            calls["torch compile"] = lambda ids=ids, mask=mask, fast=fast: fast(ids, mask)
        times = measure(calls, ROUNDS, inner=4 if batch == 1 else 1)
        sizes = (float32.weight_bytes, source_bytes(path), size)
        figures = ("mean cosine", r["cosine"].value, 1.0, "cosine", [r["cosine"].low, r["cosine"].high], r)
        rows.append(row("MiniLM-L6", "int8", case, sizes, *figures, times, exe.threads))
    return rows


# --- a convolutional network ----------------------------------------------------------------------


def image_model() -> list[dict]:
    from narrowcast.runtime.tasks import to_pixels

    path = models.efficientnet()
    say("[bold]EfficientNet-Lite0[/bold]")
    model = load_model(path)
    calibration, test = models.pictures()
    start = time.monotonic()
    plan = narrowcast.compress(model, recipe="int8", data=models.crops(calibration, 100, 1, model.config))
    exe, size = save(plan, "efficientnet-lite0-int8")
    say(f"  int8: {size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")

    from efficientnet_labels import label

    for name in ("coffee", "cat"):
        probabilities = exe(to_pixels(test[name], model.config)).softmax(-1)[0]
        top = probabilities.topk(2)
        shown = ", ".join(f"{label(i)} {p:.2f}" for p, i in zip(top.values.tolist(), top.indices.tolist()))
        console.print(f"         [green]{name}.png[/green] -> {shown}")

    float32, images = float_plan(model), models.crops(list(test.values()), 400, 2, model.config)
    r = narrowcast.evaluate(exe, images, float32, device="cpu").metrics
    console.print(f"         {r['agreement']}, {r['agreement_confident']}, {r['kl']}, {len(images)} crops")

    module = model.exported.module().to(memory_format=torch.channels_last)
    half = copy.deepcopy(module).to(torch.bfloat16)
    rows = []
    for case, batch in (("batch1", 1), ("batch16", 16)):
        x = images[:batch].contiguous(memory_format=torch.channels_last)
        y = x.bfloat16()
        calls = {
            "narrowcast": lambda x=x: exe(x),
            "torch fp32": lambda x=x: module(x),
            "torch bf16": lambda y=y: half(y),
        }
        fast = compiled(module, x) if batch == 1 else None
        if fast is not None:
            calls["torch compile"] = lambda x=x, fast=fast: fast(x)
        times = measure(calls, ROUNDS, inner=4 if batch == 1 else 1)
        sizes = (float32.weight_bytes, source_bytes(path), size)
        figures = (
            "top-1 agreement",
            r["agreement"].value,
            1.0,
            "share",
            [r["agreement"].low, r["agreement"].high],
            r,
        )
        rows.append(row("EfficientNet-Lite0", "int8", case, sizes, *figures, times, exe.threads))
    return rows


def show(rows: list[dict]) -> None:
    table = Table(title="narrowcast beside torch", title_justify="left")
    columns = (
        "model",
        "recipe",
        "case",
        "float32 MB",
        "file MB",
        "plan MB",
        "metric",
        "value",
        "ms",
        "torch fp32",
        "torch best",
        "speed-up",
    )
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("model", "recipe", "case", "metric") else "right"
        )
    for r in rows:
        table.add_row(
            r["model"], r["recipe"], r["case"],
            *(f"{r[k] / 1e6:.1f}" for k in ("bytes_before", "bytes_file", "bytes_after")),
            r["metric"], f"{r['value']:+.4f}" if "increase" in r["metric"] else f"{r['value']:.4f}",
            f"{r['ms']:.2f}", f"{r['ms_torch_fp32']:.2f}", f"{r['ms_torch_best']:.2f} ({r['torch_best'][6:]})",
            f"{r['ms_torch_best'] / r['ms']:.2f}x",
        )  # fmt: skip
    console.print(table)
    console.print(
        "speed-up: the fastest of torch (float32, bfloat16, compiled where shown) over ours, medians, same run"
    )


def main() -> None:
    PLANS.mkdir(parents=True, exist_ok=True)
    parts = {"encoder": encoder, "image": image_model, "language": language_model}
    chosen = sys.argv[1:] or list(parts)
    rows = []
    for name in chosen:
        rows += parts[name]()
    show(rows)
    out = ROOT / "build" / "demo.json"
    out.write_text(json.dumps(rows, indent=2) + "\n")
    say(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
