"""Proofs of the GPU kernels, and the table of them in kernels/README.md.

    python tools/verified.py                       # write the table again
    python tools/verified.py build/gpu/correctness.json   # take over what passed there, then write the table

A proof is a row of python/narrowcast/proven.json: op, backend and architecture, the hash of the kernel's sources, the
device, and the seed of the tests. It counts while the sources are those bytes; dispatch.py goes by the same rows.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from emulator.build import PROGRAMS  # noqa: E402
from narrowcast import dispatch  # noqa: E402

PROOFS = ROOT / "python" / "narrowcast" / "proven.json"
README = ROOT / "kernels" / "README.md"
KEPT = ("op", "backend", "arch", "sources", "device", "uuid", "seed", "passed", "versions")
HEAD = "| ops | backend | state | takes |\n|---|---|---|---|\n"


def take_over(path: Path) -> int:
    """Adds the rows of a correctness file whose tests all passed, in place of older ones."""
    rows = [r for r in json.loads(path.read_text()) if r.get("backend") in ("cuda", "triton")]
    key = lambda r: (r["op"], r["backend"], r["arch"])  # noqa: E731
    proofs = {key(r): r for r in json.loads(PROOFS.read_text())}
    for row in rows:
        current = dispatch.source_hash(row["op"], row["backend"])
        if row["failed"]:
            proofs.pop(key(row), None)
        elif row["passed"] and row["sources"] == current:
            proofs[key(row)] = {name: row[name] for name in KEPT}
    PROOFS.write_text(json.dumps([proofs[k] for k in sorted(proofs)], indent=1) + "\n")
    return len(rows)


def without_a_gpu(room: str, backend: str) -> str:
    """What is known of a room's kernels on every machine."""
    if backend == "cuda":
        emulated = any(k.startswith(f"{room}/") for kernels, _ in PROGRAMS.values() for k in kernels)
        return "compiles; emulator-verified" if emulated else "compiles"
    interpreted = any(
        f"kernels.{room}" in path.read_text() for path in (ROOT / "tests/triton_kernels").glob("test_*.py")
    )
    return "compiles; interpreter-verified" if interpreted else "compiles"


def state(op: str, backend: str, proofs: list[dict]) -> str:
    current = dispatch.source_hash(op, backend)
    devices = [
        f"{p['device']} ({p['arch']}, {p['uuid'][:12]}, sources {p['sources'][:8]}, seed {p['seed']})"
        for p in proofs
        if (p["op"], p["backend"], p["sources"]) == (op, backend, current)
    ]
    known = without_a_gpu(dispatch.ROOM_OF[op], backend)
    return f"{known}; passed on {', '.join(devices)}" if devices else f"{known}; not run on a GPU"


def written(op: str, backend: str) -> bool:
    if backend == "cuda":
        return f'"_{op}_cuda(' in (ROOT / "kernels" / "library.cpp").read_text()
    return dispatch.triton_module(op) is not None


def lines() -> Iterator[str]:
    proofs = json.loads(PROOFS.read_text())
    for ops in dispatch.ROOMS.values():
        for backend in ("cuda", "triton"):
            groups: dict[str, list[str]] = {}
            for op in ops:
                if written(op, backend):
                    takes = "; ".join(map(str, dispatch.limits(op).get(backend, ()))) or "the contract"
                    text = f"{state(op, backend, proofs)} | {takes}"
                    groups.setdefault(text, []).append(f"`{op}`")
            for text, names in groups.items():
                yield f"| {', '.join(names)} | {backend} | {text} |"


def table() -> str:
    return HEAD + "\n".join(lines()) + "\n"


def readme() -> str:
    """The README with the table of today."""
    return re.sub(re.escape(HEAD) + r"(?:\|.*\n)*", lambda _: table(), README.read_text())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{take_over(Path(argument))} rows of {argument}")
    README.write_text(readme())
