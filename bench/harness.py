"""Timings that can be judged: interleaved with their peers, beside the physical limit of the machine.

A result file is a list of rows, one JSON object each, and one row that describes the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import narrowcast
from narrowcast.files import atomic_path
from narrowcast.runtime.threads import cpu_name

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = Path(__file__).parent / "results"


class Timing(float):
    """Seconds of one call: the median, with the distance between the quartiles relative to it."""

    spread: float = 0.0


def measure(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 0.5, rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:  # fmt: skip
    """Times each callable in `rounds` turns, one after the other, so that all meet the same machine.

    A turn repeats a call until it is long enough for the clock; `seconds` is the length of it all. The first call
    of a turn is not timed: it finds caches and threads as the engine before left them.
    """
    repeats = {}
    for name, call in calls.items():
        call(), call()  # first use: packing, page faults, code
        start = clock()
        call()
        once = max(clock() - start, 1e-7)
        repeats[name] = max(1, round(seconds / len(calls) / rounds / once))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, count = calls[name], repeats[name]
            call()
            start = clock()
            for _ in range(count):
                call()
            samples[name].append((clock() - start) / count)
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median)
        timings[name].spread = (high - low) / median
    return timings


def _best(call: Callable[[], object], seconds: float = 0.3) -> float:
    call()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@cache
def _read_bandwidth(threads: int) -> float:
    x = torch.ones(64 << 20)  # 256 MiB, larger than any cache
    return x.nbytes / _best(x.sum, 0.5)


def read_bandwidth() -> float:
    """Bytes per second read from memory by the threads at hand."""
    return _read_bandwidth(torch.get_num_threads())


@cache
def float_peak(threads: int) -> float:
    """Float32 operations per second of a large matrix product: what FMA reaches in practice."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / _best(lambda: a @ b)


@cache
def int8_peak(threads: int) -> float:
    """Int8 operations per second of a large product through ``linear_int8``."""
    codes = torch.randint(-127, 128, (1024, 1024), dtype=torch.int8)
    scale = torch.ones(1024)
    return 2 * 1024**3 / _best(lambda: torch.ops.narrowcast.linear_int8(codes, scale, codes, scale))


def machine() -> dict:
    """The machine row: what the numbers of a file were measured on."""
    threads = torch.get_num_threads()
    return {
        "room": "machine",
        "cpu": cpu_name(),
        "isa": torch.ops.narrowcast._isa(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "read_bandwidth": read_bandwidth(),
        "float32_peak": float_peak(threads),
        "int8_peak": int8_peak(threads),
    }


def floor_of(bytes_moved: float = 0, operations: float = 0, peak: float | None = None) -> float:
    """Seconds that the machine needs at least: the slower of the traffic and the arithmetic."""
    threads = torch.get_num_threads()
    arithmetic = operations / (peak or float_peak(threads)) if operations else 0.0
    return max(bytes_moved / read_bandwidth(), arithmetic)


def row(
    room: str,
    case: str,
    ours: float,
    peers: Mapping[str, float],
    *,
    floor: float | None = None,
    unit: str = "us",
    dtype: str = "float32",
    device: str = "cpu",
    accuracy: Mapping[str, float] | None = None,
) -> dict:
    """One result, printed and returned: ours and every peer in `unit`, floor = physical limit in it."""
    ratio = f"{min(peers.values()) / ours:5.2f}x of best peer" if peers else ""
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
        "peers": dict(peers),
        "floor": floor,
        "accuracy": dict(accuracy or {}),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"narrowcast": narrowcast.__version__, "torch": torch.__version__},
    }


def timed_row(room: str, case: str, timings: Mapping[str, Timing], *, dtype: str, floor: float) -> dict:
    """The row of what measure() returned for "ours" and its peers, in microseconds; floor in seconds."""
    micro = {name: round(t * 1e6, 3) for name, t in timings.items()}
    result = row(room, case, micro.pop("ours"), micro, floor=round(floor * 1e6, 3), dtype=dtype)
    return result | {"spread": round(timings["ours"].spread, 3)}


def best_peer(result: Mapping) -> tuple[str, float]:
    """Name of the fastest peer, and how many times our time it takes (above 1: we are faster)."""
    name = min(result["peers"], key=result["peers"].get)
    return name, result["peers"][name] / result["ours"]


def show(rows: Sequence[Mapping], console: Console | None = None) -> None:
    from rich.console import Console  # which a machine that only writes rows need not have
    from rich.table import Table

    table = Table(title=None, header_style="bold")
    for heading in ("room", "case", "dtype", "threads"):
        table.add_column(heading)
    for heading in ("time", "best peer", "ratio", "floor", "of floor"):
        table.add_column(heading, justify="right")
    for r in rows:
        name, ratio = best_peer(r) if r["peers"] else ("", float("nan"))
        style = "" if not r["peers"] else "green" if ratio >= 1 else "red"
        table.add_row(
            r["room"], r["case"], r["dtype"], str(r["threads"]), f"{r['ours']:.2f} {r['unit']}", name,
            f"[{style}]{ratio:.2f}[/]" if style else "", f"{r['floor'] or 0:.2f}",
            f"{(r['floor'] or 0) / r['ours']:.0%}",
        )  # fmt: skip
    (console or Console()).print(table)


def write(rows: Sequence[Mapping], path: str | Path) -> Path:
    """Rows and the machine row as JSON; a reader sees the old file or the new one, never a part.

    A bare name goes to bench/results/NAME.json.
    """
    path = Path(path)
    if path.suffix != ".json":
        path = RESULTS / f"{path}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps([machine(), *rows], indent=1) + "\n")
    return path


def options(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """--threads, --quick and --json of every bench script; sets the threads and turns gradients off."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a fifth of the time per case")
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    torch.set_grad_enabled(False)
    chosen.seconds = 0.1 if chosen.quick else 0.5
    return chosen


def finish(rows: Sequence[Mapping], chosen: argparse.Namespace) -> None:
    """The end of every bench script: the table, and the file when one was asked for."""
    show(rows)
    if chosen.json:
        print(write(rows, chosen.json))
