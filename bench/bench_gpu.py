"""Every op on a GPU beside the peers that are installed there, at the shapes of models.

    python bench/bench_gpu.py [ROOM...] [--quick] [--seconds 0.4] [--budget 400] [--seed 1] [--json PATH] [--list]

All contenders of a case take turns on the same random inputs; sets of them rotate until twice the L2 cache has gone by,
calls run from a CUDA graph where they can be captured, times are medians of device events. Every result is compared
with float64 first: a wrong one gets no time. The floor of a row is the bytes over the copy bandwidth, or the operations
over the rate of torch's own large products, both measured in this run. --budget: no case begins after so many seconds;
rooms share them, and what one leaves goes to the next. The room "plans" (gpu_plans.py) times whole models beside torch,
and takes part where it is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_peers
import gpu_plans
from gpu_cases import CASES, Case, Inputs
from gpu_harness import Draw, Floors, Loop, measure_floors, sets_for, timed
from harness import row
from narrowcast import dispatch
from narrowcast.files import atomic_path

#: Room -> its cases.
ROOMS = {**CASES, gpu_plans.ROOM: gpu_plans.cases}
PEER_LIMIT = 0.25  # peers round weights in ways of their own; more than this is another function
ROUNDS = 11


@dataclass(frozen=True)
class Device:
    """Where cases run, with what was measured there. name and uuid go into every row."""

    device: torch.device
    name: str
    uuid: str
    cache_bytes: int
    floors: Floors


def this_gpu(seed: int) -> Device:
    device = torch.device("cuda", torch.cuda.current_device())
    facts = torch.cuda.get_device_properties(device)
    return Device(device, facts.name, str(facts.uuid), facts.L2_cache_size, measure_floors(device, seed))


def device_row(here: Device, seed: int) -> dict[str, Any]:
    return {
        "room": "device", "device": here.name, "uuid": here.uuid, "cache_bytes": here.cache_bytes, "seed": seed,
        "copy_bandwidth": here.floors.bandwidth, "peaks": dict(here.floors.peaks), "cuda": torch.version.cuda,
        "versions": gpu_peers.versions(), "absent": gpu_peers.absent(),
    }  # fmt: skip


def backends_of(op: str, device: torch.device) -> list[str]:
    if device.type != "cuda":
        return ["cpu"]
    return [name for name in ("cuda", "triton") if not dispatch.available(op)[name]]


@contextlib.contextmanager
def served_by(backend: str) -> Iterator[None]:
    with contextlib.nullcontext() if backend == "cpu" else dispatch.backend(backend):
        yield


def our_call(case: Case, inputs: Inputs, backend: str):
    def call() -> Any:
        with served_by(backend):
            return case.ours(**inputs)

    return call


def error_of(got: Tensor, exact: Tensor) -> float:
    """NaN where anything is not finite."""
    got = got.to(exact.device, torch.float64)
    return ((got - exact).norm() / exact.norm()).item()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def contenders(
    case: Case, sets: list[Inputs], device: torch.device
) -> tuple[dict[str, Loop], dict[str, float], dict[str, str]]:
    """Loops that gave right results, the error of each that was compared, and why others are not here."""
    exact = case.exact(sets[0])
    loops, errors, refused = {}, {}, {}
    builders: list[tuple[str, Any, Any, float]] = [
        (f"ours {b}", lambda i, b=b: our_call(case, i, b), case.value, case.limit)
        for b in backends_of(case.op, device)
    ]
    missing = gpu_peers.absent()
    builders += [
        (p.name, p.build, (lambda y: y) if p.compared else None, PEER_LIMIT)
        for p in case.peers if p.package not in missing
    ]  # fmt: skip
    for name, build, value, limit in builders:
        try:
            calls = [build(inputs) for inputs in sets]
            if value:
                errors[name] = error_of(case.part(value(calls[0]())), exact)
                if not errors[name] <= limit:
                    refused[name] = f"wrong: relative error {errors[name]:.3g}, at most {limit} allowed"
                    continue
            loops[name] = Loop(calls, device)
        except Exception as error:  # a peer may raise anything, and must not end the run
            refused[name] = first_line(error)
    return loops, errors, refused


def failure(case: Case, reason: str) -> dict[str, Any]:
    print(f"{case.room:16s} {case.name:44s} FAILED: {reason}", flush=True)
    return {"room": case.room, "case": case.name, "state": "failed", "reason": reason}


def rows_of(case: Case, here: Device, seed: int, seconds: float) -> list[dict[str, Any]]:
    """A row per backend of ours: timed, or failed with the reason."""
    draw = Draw(here.device, seed)
    sets = [case.make(draw)]
    input_bytes = sum(t.nbytes for t in sets[0].values() if isinstance(t, Tensor))
    sets += [case.make(draw) for _ in range(sets_for(input_bytes, here.cache_bytes) - 1)]
    loops, errors, refused = contenders(case, sets, here.device)
    times = timed(loops, here.device, seconds, ROUNDS) if loops else {}
    backends = backends_of(case.op, here.device)
    if not backends:
        lacking = dispatch.available(case.op)
        reason = "; ".join(f"{name}: {lacking[name]}" for name in ("cuda", "triton"))
        return [failure(case, reason)]
    floor, floor_by = here.floors.of(case.moved, case.operations)
    micro = {name: round(t * 1e6, 3) for name, t in times.items()}
    others = {name: t for name, t in micro.items() if not name.startswith("ours ")}
    rows = []
    for backend in backends:
        name = f"ours {backend}"
        facts = {
            "op": case.op, "backend": backend, "gpu": here.name, "uuid": here.uuid, "seed": seed,
            "sources": dispatch.source_hash(case.op, backend) if backend != "cpu" else None,
            "sets": len(sets), "floor_by": floor_by,
            "refused": {n: why for n, why in refused.items() if not n.startswith("ours ")},
        }  # fmt: skip
        if name not in micro:
            rows.append({**failure(case, refused[name]), **facts})
            continue
        result = row(
            case.room, case.name, micro[name], others, floor=round(floor * 1e6, 3), dtype=case.dtype,
            device=here.device.type, accuracy={"relative error": errors[name]},
        )  # fmt: skip
        facts["spread"] = round(times[name].spread, 3)
        facts["eager"] = [n for n, loop in loops.items() if not loop.captured]
        rows.append({**result, **facts})
    return rows


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "rooms", nargs="*", metavar="ROOM", help=f"some of {', '.join(ROOMS)}; by default all but the last"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the time per case")
    parser.add_argument("--seconds", type=float, default=0.4, help="timing per case")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no case begins")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--list", action="store_true", help="the cases, and time nothing")
    options = parser.parse_args(argv)
    if unknown := [room for room in options.rooms if room not in ROOMS]:
        parser.error(f"ROOM must be one of {', '.join(ROOMS)}, got {unknown[0]}")
    options.rooms = options.rooms or list(CASES)
    options.seconds *= 0.25 if options.quick else 1.0
    return options


def run_all(options: argparse.Namespace, here: Device) -> list[dict[str, Any]]:
    """The device's row and those of every case, until the budget is spent."""
    begin, rows = time.monotonic(), [device_row(here, options.seed)]
    for position, room in enumerate(options.rooms, 1):
        end = begin + options.budget * position / len(options.rooms)
        for case in ROOMS[room]():
            if time.monotonic() > end:
                print(f"{case.room:16s} {case.name:44s} not timed: the budget is spent", flush=True)
                rows.append({"room": case.room, "case": case.name, "state": "not timed"})
                continue
            try:
                of = gpu_plans.rows_of if room == gpu_plans.ROOM else rows_of
                rows += of(case, here, options.seed, options.seconds)
            except RuntimeError as error:  # out of memory, or a broken context: named, and the rest tried
                rows.append(failure(case, first_line(error)))
            if here.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> int:
    options = arguments()
    if options.list:
        for room in options.rooms:
            for case in ROOMS[room]():
                print(f"{room:16s} {case.op:20s} {case.name}")
        return 0
    if not torch.cuda.is_available():
        print("bench_gpu: needs a CUDA device, and torch sees none here")
        return 1
    torch.set_grad_enabled(False)
    here = this_gpu(options.seed)
    gigabytes = here.floors.bandwidth / 1e9
    peaks = ", ".join(f"{kind} {peak / 1e12:.0f} T/s" for kind, peak in here.floors.peaks.items())
    print(
        f"{here.name}: copies {gigabytes:.0f} GB/s, products {peaks}; absent: {', '.join(gpu_peers.absent())}"
    )
    rows = run_all(options, here)
    if options.json:
        write(rows, options.json)
    failed = sum(r.get("state") == "failed" for r in rows)
    left = sum(r.get("state") in ("not timed", "absent") for r in rows)
    print(f"{len(rows) - 1 - failed - left} rows, {failed} failed, {left} not timed, on {here.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
