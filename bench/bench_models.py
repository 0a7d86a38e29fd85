"""Whole models beside other engines: same weights, same calibration data, same threads, interleaved.

python bench/bench_models.py [encoder image decoder] [--threads N] [--json NAME]

Needs the demonstration's models and, for the peers, ``pip install narrowcast[bench]``; absent engines are named.
A row's floor is the multiply-adds over the int8 peak or the bytes of the weights over the memory bandwidth,
whichever takes longer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "demo")]

import models  # noqa: E402

import harness  # noqa: E402
import narrowcast  # noqa: E402
from narrowcast.compress import metrics  # noqa: E402
from narrowcast.compress.calibrate import text_batches  # noqa: E402
from narrowcast.importers.model import load_model  # noqa: E402
from narrowcast.runtime.cache import KVCache  # noqa: E402
from peers import Engine, Stopwatch, Task, engines  # noqa: E402
from resnet50 import resnet50  # noqa: E402


class Hidden(torch.nn.Module):
    """An encoder that takes ids and mask and returns the last hidden state alone, as every exporter likes it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def ours(model, recipe: str, data) -> tuple[Engine, narrowcast.Executor]:
    clock = Stopwatch()
    plan = narrowcast.compress(model, recipe=recipe, data=data)
    seconds, size = float(clock), plan.weight_bytes
    executor = narrowcast.Executor(plan)
    return Engine(f"narrowcast {recipe}", lambda *i: lambda: executor(*i), seconds, size), executor


def compare(
    room: str, case: str, mine: dict, peers: list[Engine], inputs, executor, example, accuracy, options
):
    """A row for each of our variants, all of them and all peers measured in one go."""
    calls = {name: engine.prepare(*inputs[name]) for name, engine in mine.items()}
    for engine in peers:
        try:
            calls[engine.name] = engine.prepare(*inputs["peers"])
            calls[engine.name]()
        except Exception as error:
            calls.pop(engine.name, None)
            print(f"left out of {case}: {engine.name} ({str(error).splitlines()[0][:120]})")
    times = harness.measure(calls, seconds=options.seconds * 2 * len(calls), rounds=9)
    rows = []
    for name in mine:
        macs = sum(executor[name].explain(*example[name]).weight_macs.values())
        floor = harness.floor_of(mine[name].bytes, 2 * macs, harness.int8_peak(options.threads))
        others = {n: round(t * 1e3, 4) for n, t in times.items() if n not in mine}
        row = harness.row(
            room, f"{case} {name.removeprefix('narrowcast ')}", round(times[name] * 1e3, 4), others,
            floor=round(floor * 1e3, 4), unit="ms", dtype=name.removeprefix("narrowcast "), accuracy=accuracy.get(name),
        )  # fmt: skip
        made = {e.name: {"seconds": round(e.seconds, 1), "bytes": e.bytes} for e in [mine[name], *peers]}
        rows.append(row | {"spread": round(times[name].spread, 3), "made": made, "peer_accuracy": accuracy})
    return rows


def encoder(options) -> list[dict]:
    from tokenizers import Tokenizer

    path = models.minilm()
    model = load_model(path)
    text = (models.DATA / "emma.txt").read_text()
    tokenizer = Tokenizer.from_str(model.assets["tokenizer.json"].decode())
    tokenizer.no_padding()
    bert = Hidden(models.torch_bert(path))
    calibration = [tuple(b) for b in text_batches([text], tokenizer, 128, 1)[:64]]
    mine, executor = ours(model, "int8", text)
    peers = engines("encoder", Task(bert, path, calibration, options.threads))

    def pooled(hidden, mask):
        mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1)

    rows, accuracy = [], {}
    sentences = [tokenizer.encode(s).ids for s in models.sentences()]
    batches = [(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)) for ids in sentences]
    expected = torch.cat([pooled(bert(i, m), m) for i, m in batches])
    for engine in [mine, *peers]:
        if engine.name == "torch compile":  # would compile anew for every length
            continue
        got = [engine.prepare(*b)() for b in batches]
        got = torch.cat([g if engine is mine else pooled(g, m) for g, (_, m) in zip(got, batches)])
        cosine = (got * expected).sum(-1)
        accuracy[engine.name] = {
            "cosine": round(cosine.mean().item(), 5),
            "cosine_min": round(cosine.min().item(), 5),
        }
    for batch, length in ((1, 32), (8, 128), (32, 256)):
        ids = torch.randint(1000, 20000, (batch, length))
        inputs = (ids, torch.ones_like(ids))
        rows += compare(
            "MiniLM-L6", f"{batch}x{length}", {mine.name: mine}, peers, {mine.name: inputs, "peers": inputs},
            {mine.name: executor}, {mine.name: inputs}, accuracy, options,
        )  # fmt: skip
    return rows


def image(options) -> list[dict]:
    path = models.efficientnet()
    model = load_model(path)
    pictures, test = models.pictures()
    calibration = models.crops(pictures, 100, 1, model.config)
    crops = models.crops(list(test.values()), 400, 2, model.config)
    rows = network(
        "EfficientNet-Lite0", model, models.torch_efficientnet(path), path, calibration, crops, options
    )
    # Weights from a seed: its speed is that of trained ones, its accuracy says nothing.
    module = resnet50(calibration[:32])
    batch = torch.export.Dim("batch", min=1, max=1024)
    model = load_model(
        module, (calibration[:2],), dynamic_shapes=({0: batch},), kind="image", config=model.config
    )
    return rows + network(
        "ResNet-50, random weights", model, module, path, calibration[:40], crops[:16], options
    )


def network(name: str, model, module, path: Path, calibration, crops, options) -> list[dict]:
    mine, executor = ours(model, "int8", calibration)
    module = module.to(memory_format=torch.channels_last)
    peers = engines("image", Task(module, path, [(x[None],) for x in calibration], options.threads))
    expected = torch.cat([module(x) for x in crops.split(16)])
    accuracy = {}
    for engine in [mine, *peers]:
        got = torch.cat([engine.prepare(x)().float() for x in crops.split(16)])
        result = metrics.image_metrics(expected, got)
        accuracy[engine.name] = {
            n: round(result[n].value, 5) for n in ("agreement", "agreement_confident", "kl") if n in result
        }
    rows = []
    for batch in (1, 16):
        x = (crops[:batch],)
        rows += compare(
            name, f"batch{batch}", {mine.name: mine}, peers, {mine.name: x, "peers": x},
            {mine.name: executor}, {mine.name: x}, accuracy, options,
        )  # fmt: skip
    return rows


def decoder(options) -> list[dict]:
    path = models.smollm2()
    model = load_model(path)
    text = (models.DATA / "emma.txt").read_text()
    mine, executors = {}, {}
    for recipe in ("native", "int8", "int4"):
        engine, executor = ours(model, recipe, text)
        mine[engine.name], executors[engine.name] = engine, executor
    peers = engines("decoder", Task(models.torch_llama(model), path, [], options.threads))
    rows = []
    for case, batch, length, ahead in (
        ("prefill 512", 1, 512, 0), ("decode at 64", 1, 1, 64), ("decode at 1024", 1, 1, 1024),
        ("decode batch 8", 8, 1, 64),
    ):  # fmt: skip
        ids = torch.arange(batch * length).reshape(batch, length).remainder(1000) + 100
        inputs = {"peers": (ids, ahead)}
        for name, executor in executors.items():
            cache = KVCache(executor.cache_layout(), batch, ahead + length + 64, executor.device).tensors
            start = torch.full((batch,), ahead, dtype=torch.int32)
            last = torch.arange(1, batch + 1) * length - 1
            inputs[name] = (ids, start, last, *cache)
        rows += compare("SmolLM2-135M", case, mine, peers, inputs, executors, inputs, {}, options)
    return rows


def main() -> None:
    kinds = {"encoder": encoder, "image": image, "decoder": decoder}
    chosen = [a for a in sys.argv[1:] if a in kinds] or list(kinds)
    options = harness.options(__doc__, [a for a in sys.argv[1:] if a not in kinds])
    rows = []
    with torch.inference_mode():
        for kind in chosen:
            rows += kinds[kind](options)
    harness.finish(rows, options)


if __name__ == "__main__":
    main()
