"""The usual cases of a plan, timed, whole and step by step; peers interleaved in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..graph.plan import Plan
from .cache import KVCache
from .executor import Executor


@dataclass(frozen=True)
class Case:
    """What is timed: a name, the call, and the inputs that ``Executor.profile`` takes."""

    name: str
    run: Callable[[], Any]
    inputs: tuple[Tensor, ...]


def cases_of(executor: Executor) -> list[Case]:
    """decode and prefill of a language model; short and long batches of an encoder; images."""
    if executor.kind == "decoder":
        cache = KVCache(executor.cache_layout(), 1, 576, executor.device).tensors
        ids = torch.arange(512).remainder(1000)[None] + 100
        start, token = torch.zeros(1, dtype=torch.int32), torch.tensor([[100]])
        prefill = (ids, start, torch.tensor([511]), *cache)
        decode = (token, start + 64, torch.tensor([0]), *cache)
        shapes = {"decode": decode, "prefill_512": prefill}
    elif executor.kind == "encoder":
        shapes = {
            f"{b}x{s}": (torch.full((b, s), 1000), torch.ones(b, s, dtype=torch.int64))
            for b, s in ((1, 32), (8, 128), (32, 256))
        }
    elif executor.kind == "image":
        size = int((executor.config.get("image") or {}).get("size", 224))
        shapes = {f"batch{b}": (torch.randn(b, 3, size, size),) for b in (1, 16)}
    else:
        raise UnsupportedError("bench knows the cases of language models, encoders and image models only")
    return [Case(name, lambda i=inputs: executor(*i), inputs) for name, inputs in shapes.items()]


def time_layers(plan: Plan, repeats: int = 5, threads: int | None = None) -> dict[str, Any]:
    """Milliseconds of every node on this machine's CPU, medians of ``repeats`` runs, as plain JSON.

    "cases": name -> milliseconds of a whole run, for the first two of :func:`cases_of`; a model of another kind
    runs the inputs of its certificate. "nodes": case -> name of a node -> milliseconds. Beside them device,
    kernels, threads, repeats.

    Raises UnsupportedError when there are no inputs to run.
    """
    executor = Executor(plan, device="cpu", threads=threads)
    if plan.kind in ("decoder", "encoder", "image"):
        inputs = {case.name: case.inputs for case in cases_of(executor)[:2]}
    else:
        names = sorted((n for n in plan.samples if n.startswith("input.0.")), key=lambda n: int(n[8:]))
        if not names:
            raise UnsupportedError("a plan without a certificate has no inputs to be timed with")
        inputs = {"sample": tuple(plan.samples[name] for name in names)}
    profiles = {
        case: executor.profile(*tensors, repeats=repeats, warmup=1) for case, tensors in inputs.items()
    }
    return {
        "device": str(executor.device),
        "kernels": torch.ops.narrowcast._isa(),
        "threads": executor.threads,
        "repeats": repeats,
        "cases": {case: profile.ms for case, profile in profiles.items()},
        "nodes": {case: {row.node: row.ms for row in profile.rows} for case, profile in profiles.items()},
    }


def measure(calls: dict[str, Callable[[], Any]], repeats: int, inner: int = 1) -> dict[str, dict[str, float]]:
    """Milliseconds per call: median, low, high; the calls take turns in every round, ``inner`` calls each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        for _ in range(repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(inner):
                    call()
                times[name].append((time.perf_counter() - start) * 1e3 / inner)
    return {n: {"median": sorted(t)[len(t) // 2], "low": min(t), "high": max(t)} for n, t in times.items()}


def peers_of(names: list[str], source: str, executor: Executor) -> dict[str, dict[str, Callable[[], Any]]]:
    """Peer name -> case name -> call, for the original model. "torch" runs its exported module in float32."""
    for name in names:
        if name != "torch":
            raise UnsupportedError(
                f"peer {name} is not available here; bench/ has the comparisons with other engines"
            )
    from ..importers.model import load_model

    module = load_model(source).exported.module()
    peers = {case.name: (lambda i=case.inputs: module(*i)) for case in cases_of(executor)}
    return {"torch": peers} if names else {}
