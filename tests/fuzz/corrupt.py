"""Damaged model files of every format: a load ends in an error of ours that says what is wrong, or in a legal model.

    python -m fuzz.corrupt --cases 1000                        # of every format
    python -m fuzz.corrupt --format gptq --case 7:123          # one case again

A case is drawn from "seed:number": one or two files of a whole small model (wholes.py) are damaged (damage.py) and
loaded. Anything but narrowcast's own errors with the file's name in them, a call that takes longer than HANGS_AFTER, a
dead process, or more than MEMORY bytes above what the process held before, is a failure. Loads run in child processes
with a limit on their address space, so that a crash or a blow-up is one more result.

Most cases end before torch.export, which is the same for every file that was read; one of EXPORTED goes all the way.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch

import narrowcast
from narrowcast.errors import Error, FormatError, UnsupportedError
from narrowcast.importers import gguf_llama, huggingface, load_model

from .damage import damage
from .wholes import WHOLES

MEMORY = 384 << 20  # above the process before the load; the files themselves have less than 1 MB
ADDRESSES = 2 << 30  # of address space above the process before: what asks for more is refused, and says so
HANGS_AFTER = 30.0
EXPORTED = 100
#: What a library says when an allocation was refused: a blow-up, whatever error it came in.
_REFUSED = (
    "can't allocate",
    "cannot allocate",
    "not enough memory",
    "bad_alloc",
    "unable to allocate",
    "out of memory",
)


class Read(Exception):
    """Raised where export would begin."""


def _instead_of_export(*arguments: Any, **options: Any) -> None:
    raise Read


class _Before:
    """Loads end where export would begin."""

    def __enter__(self) -> None:
        self.kept = (huggingface.export_decoder, gguf_llama.export_decoder)
        huggingface.export_decoder = gguf_llama.export_decoder = _instead_of_export

    def __exit__(self, *exception: Any) -> None:
        huggingface.export_decoder, gguf_llama.export_decoder = self.kept


def load(path: Path, whole: bool) -> str:
    """Loads as a user does. Raises what a load raises, and AssertionError for a model that is not legal."""
    if path.suffix == ".plan":
        executor = narrowcast.load(path, device="cpu", threads=1)
        try:  # whether nodes and weights fit together is known when they run
            list(executor.generate_ids([1, 2, 3], max_new_tokens=2))
        except (RuntimeError, Error) as error:
            raise FormatError(f"{path.name}: {error}") from error
        return "loaded"
    if whole or path.suffix == ".onnx":
        model = load_model(path)
        for name, form in model.native.items():
            stored = model.exported.state_dict[name]
            assert form.shape == tuple(stored.shape), (
                f"the form of {name} is {form.shape}, not {tuple(stored.shape)}"
            )
        return "loaded"
    with _Before():
        try:
            load_model(path)
        except Read:
            return "loaded"
    raise AssertionError("the load ended without a model")


def _whole(number: int) -> bool:
    return number % EXPORTED == EXPORTED - 1


# --- one case -----------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{key}:"))


def run_case(path: Path, originals: dict[str, bytes], case: str, whole: bool) -> tuple[str, str]:
    """("loaded" | "refused" | "wrong", what happened)."""
    files, what = damage(originals, Random(case))
    folder = path if path.is_dir() else path.parent
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = _status("VmRSS")
    try:
        kind, text = load(path, whole), what
    except (FormatError, UnsupportedError) as error:
        kind, text = "refused", f"{what} -> {error}"
        if path.name not in str(error):
            kind = "wrong"
            text = f"{what} -> the error does not name {path.name}: {error}"
        if any(word in str(error).lower() for word in _REFUSED):
            kind, text = "wrong", f"{what} -> asked for too much memory: {error}"
    except Exception as error:
        kind, text = "wrong", f"{what} -> {type(error).__name__}: {str(error)[:300]}"
    grown = _status("VmHWM") - before
    if grown > MEMORY:
        kind, text = "wrong", f"{what} -> {grown >> 20} MB more than before, {kind}: {text[:200]}"
    return kind, text


class Progress:
    """What a child is at, readable by its parent after its death: (case number, start time)."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 16)

    def set(self, case: int) -> None:
        self.shared[:] = struct.pack("=qd", case, time.monotonic())

    def get(self) -> tuple[int, float]:
        return struct.unpack("=qd", self.shared[:])


def work(name: str, seed: int, first: int, last: int, progress: Progress, pipe: int) -> None:
    """Cases first .. last - 1 of a format: one line of JSON for each."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars and warnings of libraries
    folder = Path(tempfile.mkdtemp(prefix="corrupt-"))
    try:
        torch.manual_seed(seed)
        path = WHOLES[name](folder)
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        originals = {p.name: p.read_bytes() for p in inside}
        with warnings.catch_warnings(), os.fdopen(pipe, "w") as out:
            warnings.simplefilter("ignore")
            # Undamaged it must load, and libraries are warm then.
            assert load(path, whole=last > EXPORTED) == "loaded"
            limit = _status("VmSize") + ADDRESSES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for number in range(first, last):
                progress.set(number)
                kind, text = run_case(path, originals, f"{name}:{seed}:{number}", _whole(number))
                print(json.dumps([number, kind, text[:600]]), file=out, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_format(
    name: str, seed: int, first: int, cases: int, report
) -> tuple[Counter[str], list[dict[str, str]]]:
    """All cases of a format, in children that are replaced when they die."""
    import select

    counts: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    progress, at = Progress(), first
    while at < first + cases:
        progress.set(-1)
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(read)
            status = 1
            try:
                work(name, seed, at, first + cases, progress, write)
                status = 0
            except BaseException as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(status)
        os.close(write)
        reason = ""
        with os.fdopen(read) as lines:
            while True:
                ready, _, _ = select.select([lines], [], [], 1.0)
                number, since = progress.get()
                if not ready:
                    if number >= 0 and time.monotonic() - since > HANGS_AFTER and not reason:
                        reason = f"HANGS: more than {HANGS_AFTER:.0f} s"
                        os.kill(child, signal.SIGKILL)
                    continue
                line = lines.readline()
                if not line:
                    break
                number, kind, text = json.loads(line)
                counts[kind] += 1
                at = number + 1
                if kind == "wrong":
                    failures.append({"format": name, "case": f"{seed}:{number}", "text": text})
                    report(failures[-1])
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        number, _ = progress.get()
        if number < 0:
            raise SystemExit(f"{name}: the undamaged model does not load, status {status}")
        reason = reason or (
            f"CRASH: {signal.Signals(status & 127).name}" if status & 127 else f"exit {status >> 8}"
        )
        counts["crashed"] += 1
        failures.append({"format": name, "case": f"{seed}:{number}", "text": reason})
        report(failures[-1])
        at = number + 1
    return counts, failures


def once(name: str, case: str) -> int:
    """One case in this process, with what was done and the whole error."""
    seed, number = map(int, case.split(":"))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        path = WHOLES[name](Path(folder))
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files, what = damage({p.name: p.read_bytes() for p in inside}, Random(f"{name}:{case}"))
        print(what, flush=True)
        for file, data in files.items():
            ((path if path.is_dir() else path.parent) / file).write_bytes(data)
        print(load(path, _whole(number)))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="per format")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--format", action="append", choices=list(WHOLES), help="only this one; may be repeated"
    )
    parser.add_argument("--case", help="SEED:NUMBER of one case to run in this process")
    parser.add_argument("--json", help="write the counts and failures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.format or list(WHOLES)
    if options.case:
        return once(names[0], options.case)
    seed = options.seed if options.seed is not None else int(time.time()) % 1_000_000
    counts, failures = {}, []
    with tempfile.TemporaryDirectory() as folder:  # imports what loads import, once for all children
        torch.manual_seed(seed)
        load(WHOLES["gptq"](Path(folder)), whole=False)
    for name in names:
        start = time.monotonic()
        counts[name], found = run_format(
            name, seed, 0, options.cases,
            lambda f: print(f"{f['format']} --case {f['case']}: {f['text']}", flush=True),
        )  # fmt: skip
        failures += found
        c = counts[name]
        print(
            f"{name}: {sum(c.values())} damaged from seed {seed} in {time.monotonic() - start:.0f} s: {c['refused']} "
            f"refused by name, {c['loaded']} still legal, {c['wrong']} wrong, {c['crashed']} crashed",
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps({"seed": seed, "counts": counts, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
