"""Timing for the bench scripts: interleaved medians, result rows, and one JSON file per machine."""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

import narrowcast

RESULTS = Path(__file__).parent / "results"


def measure(calls: dict[str, Callable], rounds: int = 30, least: float = 2e-4) -> dict[str, float]:
    """Median seconds per call of each, timed in turn so that all meet the same weather.

    A call shorter than ``least`` seconds is repeated until a sample lasts that long.
    """
    repeat, samples = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeat[name] = max(1, round(least / max(time.perf_counter() - start, 1e-9)))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeat[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeat[name])
    return {name: sorted(s)[len(s) // 2] for name, s in samples.items()}


def read_bandwidth(size: int = 64 << 20) -> float:
    """Bytes per second that torch.sum reads from memory with the threads at hand."""
    data = torch.zeros(size // 8, dtype=torch.int64)
    return size / measure({"sum": lambda: data.sum()}, rounds=10)["sum"]


def row(
    room: str, case: str, ours: float, peers: dict[str, float], *, floor: float | None = None,
    unit: str = "us", dtype: str = "float32", device: str = "cpu", accuracy: dict | None = None,
) -> dict:  # fmt: skip
    """One result, printed and returned: ours and the peers in ``unit``, the floor = physical limit."""
    best = min(peers.values(), default=None)
    ratio = f"{best / ours:5.2f}x of best peer" if best else ""
    limit = f"{floor / ours:5.0%} of the limit" if floor else ""
    names = "  ".join(f"{name} {value:.4g}" for name, value in peers.items())
    print(f"{room:16s} {case:44s} {ours:9.4g} {unit}  {ratio}  {limit}   {names}", flush=True)
    return {
        "room": room,
        "case": case,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "unit": unit,
        "ours": ours,
        "peers": peers,
        "floor": floor,
        "accuracy": accuracy or {},
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "narrowcast": narrowcast.__version__},
    }


def write(rows: list[dict], name: str) -> Path:
    """Writes bench/results/NAME.json: the rows and one "machine" row."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((s.split(":", 1)[1].strip() for s in lines if "model name" in s), model)
    machine = {
        "room": "machine",
        "cpu": model,
        "isa": torch.ops.narrowcast._isa(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps([machine, *rows], indent=1) + "\n")
    return path
