"""Every op of the library over hostile and odd input: nothing may crash, and nothing may be wrong.

    python -m fuzz.hostile --cases 500              # every op
    python -m fuzz.hostile --op linear.out --case 7:123 --verbose   # one case again

A case is drawn from "seed:number": sizes, dtypes and layouts, tensors flush against guard pages
(memory.py), the kernel that must run, and in one case of three a spoilt argument. An independent
predicate (``Op.faults``) then says whether it is legal. A legal case must compute what the reference
computes; any other must raise RuntimeError that names the op and a faulty argument. Cases run in child
processes, so a crash is one more result: it is reported with the case that caused it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import struct
import sys
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

import narrowcast  # noqa: F401  (loads the ops)

from . import attentions, images, linears, rows
from .draw import Draw, spoil
from .memory import Memory
from .spec import Op, mismatch

OPS = {
    op.name if op.overload == "default" else f"{op.name}.{op.overload}": op
    for family in (rows, linears, attentions, images)
    for op in family.OPS
}
LEAST_LEGAL = 0.6  # of the cases of every op
MOST_DIMENSIONS = 8
MOST_ELEMENTS = 1 << 22
HANGS_AFTER = 60.0  # seconds for one case
_machine = torch.ops.narrowcast


def describe(arguments: dict[str, Any]) -> str:
    def one(v: Any) -> str:
        if not isinstance(v, Tensor):
            return repr(v)
        return f"{str(v.dtype)[6:]}{list(v.shape)} strides {list(v.stride())} at {v.data_ptr() % 4096}"

    return ", ".join(f"{name}={one(v)}" for name, v in arguments.items())


def names_fault(text: str, op: Op, faults: set[str]) -> bool:
    """Whether an error reads "<op>: <argument> ..." with an argument that is at fault."""
    head, _, rest = text.partition(": ")
    return head == op.name and any(rest.startswith(name) for name in faults)


def run_case(op: Op, case: str, memory: Memory) -> tuple[str, str]:
    """("computed" | "refused" | "wrong", what happened)."""
    memory.reset()
    draw = Draw(f"{op.name}.{op.overload}:{case}", memory)
    arguments = op.draw(draw)
    if draw.chance(0.33):
        unspoilt = dict(arguments)
        spoil(draw, arguments)
        if op.elements(arguments) > MOST_ELEMENTS:
            arguments = unspoilt
    variant = ""
    if op.kernels and draw.chance(0.6):
        variant = draw.choice(_machine._op_variants(op.kernels).split(","))
    faults = op.faults(arguments)
    faults |= {n for n, v in arguments.items() if isinstance(v, Tensor) and v.dim() > MOST_DIMENSIONS}
    # In-place ops: what was there before, also in inputs that share the memory.
    before = {n: v.clone() for n, v in arguments.items() if op.written and isinstance(v, Tensor)}
    call = getattr(getattr(_machine, op.name), op.overload)
    if op.kernels:
        _machine._force_variant(op.kernels, variant)
    error = None
    try:
        results = call(**arguments)
    except RuntimeError as raised:
        error = str(raised).splitlines()[0]
    shown = f"{describe(arguments)} [{variant or 'best'}]"
    if not memory.intact():
        return "wrong", f"wrote outside its tensors: {shown}"
    if error is not None:
        if not faults:
            return "wrong", f"legal, but refused with '{error}': {shown}"
        if not names_fault(error, op, faults):
            return "wrong", f"error '{error}' names none of {sorted(faults)}: {shown}"
        for name, t in before.items():
            if not torch.equal(arguments[name].nan_to_num(1e3), t.nan_to_num(1e3)):
                return "wrong", f"refused with '{error}', but changed {name}: {shown}"
        return "refused", error
    if faults:
        return "wrong", f"computed, though {sorted(faults)} must be refused: {shown}"
    if op.written:
        results = [arguments[n] for n in op.written if arguments[n] is not None]
        arguments = {**arguments, **before}
    elif isinstance(results, Tensor):
        results = [results]
    for i, (got, want) in enumerate(zip(results, op.reference(arguments), strict=True)):
        if what := mismatch(got, want):
            return "wrong", f"result {i}: {what}: {shown}"
    return "computed", shown


class Progress:
    """What a child is at, readable by its parent after a crash: (op index, case number, start time)."""

    def __init__(self):
        self.shared = mmap.mmap(-1, 24)

    def set(self, op: int, case: int) -> None:
        self.shared[:] = struct.pack("=qqd", op, case, time.monotonic())

    def get(self) -> tuple[int, int, float]:
        return struct.unpack("=qqd", self.shared[:])


def work(todo: list[tuple[str, int, int]], seed: int, progress: Progress, pipe: int) -> None:
    """Runs [first, last) of each op and writes one line of JSON per op, and per failure, to the pipe."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty() holds NaN or the largest integer
    memory = Memory()
    with os.fdopen(pipe, "w") as out, torch.inference_mode():
        for name, first, last in todo:
            counts: Counter[str] = Counter()
            for case in range(first, last):
                progress.set(list(OPS).index(name), case)
                try:
                    kind, text = run_case(OPS[name], f"{seed}:{case}", memory)
                except Exception as error:
                    kind, text = "wrong", f"{type(error).__name__}: {error}"
                counts[kind] += 1
                if kind == "wrong":
                    print(json.dumps({"op": name, "case": f"{seed}:{case}", "text": text}), file=out)
                if case % 50 == 49 or case + 1 == last:
                    print(json.dumps({"op": name, "done": case + 1, "counts": counts}), file=out, flush=True)
                    counts = Counter()


def run_all(names: list[str], seed: int, first: int, cases: int, report) -> dict[str, Any]:
    """All cases of the ops, in children that are replaced when they die."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    failures: list[dict[str, str]] = []
    todo = [(name, first, first + cases) for name in names]
    progress = Progress()
    while todo:
        progress.set(-1, 0)
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                work(todo, seed, progress, write)
            finally:
                os._exit(0)
        os.close(write)
        status = _follow(child, read, progress, counts, failures, todo, report)
        if status == 0:
            break
        index, case, _ = progress.get()
        if index < 0:
            raise SystemExit(f"a worker died before its first case, status {status}")
        name = list(OPS)[index]
        reason = f"signal {signal.Signals(status & 127).name}" if status & 127 else f"exit {status >> 8}"
        counts[name]["crashed"] += 1
        failures.append({"op": name, "case": f"{seed}:{case}", "text": f"CRASH: {reason}"})
        report(failures[-1])
        # Cases since the last line of counts ran, but died uncounted; the next child goes on behind.
        at = [n for n, _, _ in todo].index(name)
        counts[name]["uncounted"] += case - todo[at][1]
        todo = [(name, case + 1, todo[at][2]), *todo[at + 1 :]]
        todo = [t for t in todo if t[1] < t[2]]
    return {"seed": seed, "counts": counts, "failures": failures}


def _follow(child, read, progress, counts, failures, todo, report) -> int:
    """Reads a child's lines until it ends; kills it when one case takes too long."""
    import select
    import threading

    alive = True

    def watch() -> None:
        while alive:
            time.sleep(1)
            index, _, since = progress.get()
            if alive and index >= 0 and time.monotonic() - since > HANGS_AFTER:
                os.kill(child, signal.SIGALRM)
                return

    threading.Thread(target=watch, daemon=True).start()
    with os.fdopen(read) as lines:
        select.select([lines], [], [])
        for line in lines:
            record = json.loads(line)
            if "done" in record:
                counts[record["op"]].update(record["counts"])
                while todo[0][0] != record["op"]:
                    todo.pop(0)
                todo[0] = (todo[0][0], record["done"], todo[0][2])
            else:
                failures.append(record)
                report(record)
    _, status = os.waitpid(child, 0)
    alive = False
    return status


def summary(result: dict[str, Any], seconds: float) -> tuple[list[str], bool]:
    lines, good = [], not result["failures"]
    for name, c in result["counts"].items():
        total = sum(c.values())
        legal = c["computed"] / total if total else 0.0
        enough = legal >= LEAST_LEGAL or total < 100
        good = good and enough
        if not enough or c["wrong"] or c["crashed"]:
            lines.append(
                f"{name}: {total} cases, {legal:.0%} computed, {c['refused']} refused, "
                f"{c['wrong']} wrong, {c['crashed']} crashed"
            )
    total = sum((c for c in result["counts"].values()), Counter())
    lines.append(
        f"{len(result['counts'])} ops, {sum(total.values())} cases from seed {result['seed']} in {seconds:.0f} s: "
        f"{total['computed']} computed, {total['refused']} refused by name, {total['wrong']} wrong, "
        f"{total['crashed']} crashed"
    )
    return lines, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="per op")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--op", action="append", choices=list(OPS), help="only this op; may be repeated")
    parser.add_argument("--case", help="SEED:NUMBER of one case to run in this process")
    parser.add_argument("--json", help="write the counts and failures to this file")
    parser.add_argument("--verbose", action="store_true", help="print what the one case was")
    options = parser.parse_args()
    names = options.op or list(OPS)
    if options.case:
        torch.use_deterministic_algorithms(True)
        with torch.inference_mode():
            kind, text = run_case(OPS[names[0]], options.case, Memory())
        print(f"{kind}: {text}")
        return kind == "wrong"
    seed = options.seed if options.seed is not None else int(time.time()) % 1_000_000

    def report(failure: dict[str, str]) -> None:
        print(f"{failure['op']} --case {failure['case']}: {failure['text']}", flush=True)

    start = time.monotonic()
    result = run_all(names, seed, 0, options.cases, report)
    lines, good = summary(result, time.monotonic() - start)
    print("\n".join(lines))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**result, "legal": {n: c["computed"] for n, c in result["counts"].items()}}, file)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
