"""What only a GPU can show: python tools/gpu.py [STAGE...], or make gpu STAGE=...

    build         the CUDA library, into this Python's environment
    correctness   tests/gpu, one process per room: every op and backend against float64, compiled, captured, on streams
    triton        tests/triton_kernels on the device
    conformance   every instruction of kernels/common/ptx.cuh beside the emulator's word for it
    sanitizer     compute-sanitizer over small cases of the compiled kernels, where the tool is
    bench         bench/bench_gpu.py, room after room: every op beside the peers that are installed
    plans         bench/bench_gpu.py plans: whole models, captured in CUDA graphs, beside torch

A room that bench times (linear_int8, attention, ...) is a stage too: its timings alone, for as long as they take.
Every part of a stage is a process with a time limit of its own; a part that fails or hangs hides no other. A stage
ends within 9 minutes and leaves OUT/<stage>.json (OUT: build/gpu by default): rows, and one that describes the machine.
The exit code is 1 if anything failed. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
STAGE_SECONDS = 520
TOGETHER = 6  # processes that share the device; timings have it to themselves
#: Part of the stage bench -> its seconds, and rooms with cases in bench/gpu_cases.py. A process each would cost a room
#: half its time for the start.
TIMED = {
    "products": (180, ("linear", "linear_int8", "linear_grouped")),
    "attentions": (130, ("attention", "attention_int8", "attention_decode")),
    "elementwise": (40, ("dequantize", "quantize", "norm")),
    "convolutions": (90, ("conv2d", "conv2d_int8")),
}
TIMED_ROOMS = [room for _, rooms in TIMED.values() for room in rooms]
PYTHON = sys.executable
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@dataclass
class Part:
    """A process. ``{json}`` in its command is a file where it may leave rows."""

    name: str
    command: list[str]
    seconds: int = 480
    environment: dict[str, str] = field(default_factory=dict)


def tool(name: str) -> str | None:
    at_home = CUDA / "bin" / name
    return shutil.which(name) or (str(at_home) if at_home.is_file() else None)


def pytest(name: str, *arguments: str) -> Part:
    # Failures of one room can leave a CUDA context that fails everything after: hence a process each.
    return Part(name, [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments])


def build() -> list[Part]:
    environment = {"NARROWCAST_CUDA": "ON"}
    if compiler := tool("nvcc"):
        environment["CUDACXX"] = compiler
    command = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    return [Part("install", command, 500, environment)]


def correctness() -> list[Part]:
    rooms = [p.name for p in sorted((ROOT / "kernels").iterdir()) if (p / "__init__.py").is_file()]
    ops = ["tests/gpu/test_ops.py", "--json", "{json}"]
    parts = [pytest(room, *ops, "--room", room) for room in rooms if room != "common"]
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    return parts + [pytest(f.stem, f"tests/gpu/{f.name}") for f in files if f.name != "test_ops.py"]


def triton() -> list[Part]:
    return [pytest(f.stem, str(f)) for f in sorted((ROOT / "tests/triton_kernels").glob("test_*.py"))]


def conformance() -> list[Part]:
    command = [PYTHON, str(ROOT / "tests/gpu/conformance.py"), "--json", "{json}"]
    return [Part("ptx", command, environment={"CUDA_HOME": str(CUDA)})]


def sanitizer() -> list[Part]:
    program = tool("compute-sanitizer") or "compute-sanitizer"
    small = [PYTHON, str(ROOT / "tests/gpu/small.py")]
    return [
        Part(
            check, [program, "--tool", check, "--error-exitcode", "9", *small], 480,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for check in ("memcheck", "racecheck")
    ]  # fmt: skip


def timings(name: str, budget: int, *rooms: str) -> Part:
    script = [PYTHON, str(ROOT / "bench/bench_gpu.py"), *rooms, "--budget", str(budget), "--json", "{json}"]
    return Part(name, script, budget + 60)  # the start, the floors, and a case under way


def bench() -> list[Part]:
    return [timings(name, budget, *rooms) for name, (budget, rooms) in TIMED.items()]


def plans() -> list[Part]:
    return [timings("plans", STAGE_SECONDS - 80, "plans")]


STAGES: dict[str, Callable[[], list[Part]]] = {
    "build": build, "correctness": correctness, "triton": triton, "conformance": conformance,
    "sanitizer": sanitizer, "bench": bench, "plans": plans,
}  # fmt: skip


def parts_of(stage: str) -> list[Part]:
    return STAGES[stage]() if stage in STAGES else [timings(stage, STAGE_SECONDS - 80, stage)]


def machine() -> dict:
    query = "name,uuid,driver_version,memory.total"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        gpus = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    except OSError:
        gpus = []
    return {"room": "machine", "gpus": gpus, "cores": os.cpu_count(), "python": platform.python_version()}


def run(part: Part, folder: Path, deadline: float) -> tuple[dict, list[dict]]:
    """The part's own row, and those it left."""
    rows_path = folder / f"{part.name}.json"
    command = [str(rows_path) if word == "{json}" else word for word in part.command]
    limit, start = min(part.seconds, deadline - time.monotonic()), time.monotonic()
    state, text = "failed", ""
    if limit < 5:
        text = "no time was left in this stage"
    else:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **part.environment}, timeout=limit,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
            text = done.stdout
            # 5: pytest found nothing to run, as in a room without an op for CUDA
            state = "passed" if done.returncode in (0, 5) else "failed"
        except subprocess.TimeoutExpired as over:
            text = f"stopped after {limit:.0f} s\n" + (over.stdout or b"").decode(errors="replace")
        except OSError as error:
            text = f"could not start: {error}"
    seconds = round(time.monotonic() - start, 1)
    row = {"room": "part", "case": part.name, "state": state, "seconds": seconds}
    row["output"] = text.strip()[-8000:]
    try:
        rows = json.loads(rows_path.read_text())
    except (OSError, ValueError):
        rows = []
    return row, rows


def run_stage(name: str) -> list[dict]:
    print(f"== {name}", flush=True)
    deadline, rows, own = time.monotonic() + STAGE_SECONDS, [], []
    together = 1 if name in ("bench", "plans", *TIMED_ROOMS) else TOGETHER
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(together) as pool:
        for row, found in pool.map(lambda part: run(part, Path(folder), deadline), parts_of(name)):
            last = row["output"].splitlines()[-1:] or [""]
            print(f"{row['state']:8} {row['case']:24} {row['seconds']:6.1f} s  {last[0]}", flush=True)
            own.append(row)
            rows += found
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps([machine(), *own, *rows], indent=1) + "\n")
    return own


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)} (all by default), or a room"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and run nothing")
    options = parser.parse_args()
    chosen = options.stages or list(STAGES)
    if unknown := [name for name in chosen if name not in (*STAGES, *TIMED_ROOMS)]:
        parser.error(f"STAGE must be one of {', '.join((*STAGES, *TIMED_ROOMS))}, got {unknown[0]}")
    if options.dry_run:
        for name in chosen:
            for part in parts_of(name):
                print(f"{name:12} {part.name:24} {part.seconds:4} s  {' '.join(part.command)}")
        return 0
    failed = [
        f"{name} {row['case']}" for name in chosen for row in run_stage(name) if row["state"] != "passed"
    ]
    print(f"failed: {', '.join(failed)}" if failed else "everything passed", f"(results: {OUT})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
