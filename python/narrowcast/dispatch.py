"""Which backend serves an op on a CUDA device: the table, and the reasons.

C++ serves CPU tensors. For CUDA tensors every op of the catalogue has one Python implementation (_register_cuda.py),
which asks :func:`serving` per call:

- ``cuda``: the compiled kernel, private op ``_<op>_cuda`` of the CUDA library.
- ``triton``: the function named as the op in a ``<room>/*_triton.py`` file, compiled when first used.
- ``reference``: the kernels of the CPU, on copies. Slow, and always right.

By default only a backend takes part that has passed its tests on this architecture (``proven.json``, written from
test runs on real devices; a row whose kernels have changed since is void). ``NARROWCAST_BACKEND``, or
``with narrowcast.backend("triton"):``, uses one without that proof, and raises where an op lacks it.
``narrowcast.explain("linear_int8", [[1, 4096], [11008, 4096]])`` tells what would run and why.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError
from .functional import ROOMS
from .kernels.common import tuning

BACKENDS = ("cuda", "triton", "reference")
ROOM_OF = {op: room for room, ops in ROOMS.items() for op in ops}
#: Served by one implementation for all devices, registered in C++.
EVERYWHERE = {"nan_count"}

#: Rows of the activations -> shape class. Few rows are bound by the bytes of the weights, many by arithmetic.
FEW_ROWS = 16

#: Best first, by room, architecture at least, and shape class. What `measure` found on this machine comes before it.
#: Triton reaches wgmma, which the mma.sync kernels do not: INT8 at about 60 % of Hopper's rate.
ORDER: dict[tuple[str, int, str], tuple[str, ...]] = {
    ("linear_int8", 90, "many"): ("triton", "cuda"),
    ("linear_grouped", 90, "many"): ("triton", "cuda"),
    ("conv2d_int8", 90, "many"): ("triton", "cuda"),
    ("attention", 90, "many"): ("triton", "cuda"),
    ("attention_int8", 90, "many"): ("triton", "cuda"),
}
DEFAULT_ORDER = ("cuda", "triton")


def _known(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ArgumentError(f"{source} must be reference, triton or cuda, got {backend!r}")
    return backend


_environment = os.environ.get("NARROWCAST_BACKEND")
_forced: ContextVar[str | None] = ContextVar(
    "narrowcast_backend", default=_known(_environment, "NARROWCAST_BACKEND") if _environment else None
)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``with narrowcast.backend("triton"):`` CUDA tensors are served by this backend only.

    reference, triton or cuda; applies to this thread or task. An op that lacks it raises RuntimeError.
    """
    token = _forced.set(_known(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


# What exists


@functools.cache
def _folder(room: str) -> Path:
    """Where the sources of a room lie; as kernels are laid out in the package."""
    package = importlib.import_module(f"{__package__}.kernels.{room}")
    return Path(next(iter(package.__path__)))


@functools.cache
def _triton_modules(room: str) -> dict[str, str]:
    """Op -> module whose function has its name. Read from the source: importing triton takes a second."""
    found: dict[str, str] = {}
    for path in sorted(_folder(room).glob("*_triton.py")):
        for op in re.findall(r"^def (\w+)\(", path.read_text(), re.M):
            if op in ROOMS[room]:
                found[op] = f"{__package__}.kernels.{room}.{path.stem}"
    return found


def triton_module(op: str) -> str | None:
    """The module whose function of this name runs the op in Triton, unless there is none."""
    return _triton_modules(ROOM_OF[op]).get(op)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_cuda(op: str) -> bool:
    """Whether the loaded CUDA library has the op."""
    name = f"narrowcast::_{op}_cuda"
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    except RuntimeError:  # not even declared
        return False


def available(op: str) -> dict[str, str]:
    """Backend -> "" if it can run here, else why not."""
    reasons = {"cuda": "", "triton": "", "reference": ""}
    if not has_cuda(op):
        reasons["cuda"] = "no compiled kernel in the loaded libraries"
    if triton_module(op) is None:
        reasons["triton"] = "not written in Triton"
    elif not _triton_installed():
        reasons["triton"] = "the package triton is not installed"
    return reasons


# What is proven


def _imported(path: Path, root: Path) -> Iterator[Path]:
    """What a kernel source includes or imports of the other kernels."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from (root / name for name in re.findall(r'^#include "([\w/.]+)"', text, re.M))
        return
    for dots, module, names in re.findall(r"^from (\.+)([\w.]*) import (.+)", text, re.M):
        base = (path.parent if dots == "." else path.parent.parent).joinpath(*module.split("."))
        yield base.with_suffix(".py")
        yield from (base / f"{name}.py" for name in re.findall(r"\w+", names))


def source_hash(op: str, backend: str) -> str | None:
    """Of the kernels that serve an op, and of all they import: a proof holds for these bytes only.

    None where the sources are not installed: wheels carry no CUDA sources.
    """
    room, root = _folder(ROOM_OF[op]), _folder("common").parent
    module = triton_module(op) if backend == "triton" else None
    waiting = [room / f"{module.rpartition('.')[2]}.py"] if module else []
    if backend == "cuda":
        waiting = list(room.glob("*.cu"))
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in seen and path.is_file():
            seen.add(path)
            waiting += _imported(path, root)
    if not seen:
        return None
    contents = sorted((path.relative_to(root).as_posix(), path.read_bytes()) for path in seen)
    return hashlib.sha256(b"".join(name.encode() + b"\0" + data for name, data in contents)).hexdigest()


@functools.cache
def _proofs() -> list[dict[str, str]]:
    return json.loads((Path(__file__).parent / "proven.json").read_text())


@functools.cache
def proven(op: str, backend: str, arch: str) -> bool:
    """Whether the tests of this very code passed on a device of this architecture (sm_90)."""
    if backend == "reference":
        return True
    for row in _proofs():
        if (row["op"], row["backend"], row["arch"]) == (op, backend, arch):
            return source_hash(op, backend) in (None, row["sources"])
    return False


# What is chosen


ASKED_FOR = "asked for"


@dataclass(frozen=True)
class Choice:
    backend: str
    reason: str


def shape_class(op: str, shape: Sequence[int]) -> str:
    """few or many rows: those of x, of its images' pixels, or of the queries."""
    if not shape:
        return "few"
    rows = 1
    for size in shape[:1] + shape[2:] if ROOM_OF[op] in ("conv2d", "conv2d_int8", "pool") else shape[:-1]:
        rows *= size
    return "few" if rows <= FEW_ROWS else "many"


def _order(op: str, arch: str, rows: str) -> tuple[str, ...]:
    capability = int(arch.removeprefix("sm_"))
    for (room, least, klass), order in ORDER.items():
        if room == ROOM_OF[op] and capability >= least and klass == rows:
            return order
    return DEFAULT_ORDER


@functools.lru_cache(maxsize=4096)
def choose(op: str, arch: str, rows: str, forced: str | None, measured: str | None = None) -> Choice:
    """The backend for an op, with the reason. Raises RuntimeError if the forced one cannot run."""
    lacking = available(op)
    if forced:
        if lacking[forced]:
            able = ", ".join(b for b, reason in lacking.items() if not reason)
            raise RuntimeError(f"{op}: backend must be one of {able}, got {forced}: {lacking[forced]}")
        return Choice(forced, ASKED_FOR)
    able = [b for b in _order(op, arch, rows) if not lacking[b]]
    trusted = [b for b in able if proven(op, b, arch)]
    if measured in trusted:
        return Choice(measured, f"the fastest of {', '.join(trusted)} when measured on this machine")
    if trusted:
        return Choice(trusted[0], f"first of {', '.join(trusted)} by the table, for {rows} rows on {arch}")
    if able:
        return Choice(
            "reference",
            f"{' and '.join(able)} can run but passed no tests on {arch} yet; "
            f"NARROWCAST_BACKEND={able[0]} uses it all the same",
        )
    return Choice("reference", "; ".join(f"{b}: {lacking[b]}" for b in ("cuda", "triton")))


def _arch(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _key(op: str, rows: str, tensors: Sequence[Tensor]) -> str:
    return f"backend {op} {rows} " + " ".join(str(t.dtype).removeprefix("torch.") for t in tensors[:3])


def serving(op: str, tensors: Sequence[Tensor]) -> Choice:
    """The choice for a call with these tensors, x first."""
    if forced := _forced.get():
        return choose(op, "", "", forced)
    first = tensors[0]
    rows = shape_class(op, first.shape)
    measured = tuning.table(first.device.index).get(_key(op, rows, tensors))
    return choose(op, _arch(first.device), rows, None, measured)


def measure(op: str, *arguments: Any, **options: Any) -> dict[str, float]:
    """Times every proven backend of an op on these CUDA tensors and remembers the best for this GPU model.

    Returns backend -> milliseconds. Later calls of its shape class and dtypes use the fastest.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if not tensors or not tensors[0].is_cuda:
        raise ArgumentError(f"{op}: arguments must begin with a tensor on a GPU")
    function, times = getattr(torch.ops.narrowcast, op), {}
    for name in DEFAULT_ORDER:
        if not available(op)[name] and proven(op, name, _arch(tensors[0].device)):
            with backend(name):
                times[name] = tuning.milliseconds(lambda: function(*arguments, **options))
    if times:
        key = _key(op, shape_class(op, tensors[0].shape), tensors)
        tuning.table(tensors[0].device.index).put(key, min(times, key=times.__getitem__))
    return times


def explain(op: str, shapes: Sequence[Sequence[int]] = (), arch: str | None = None) -> str:
    """Which backend serves an op for arguments of these shapes, and why, as text.

    arch: such as "sm_90"; by default that of the current GPU, or the CPU where there is none.
    """
    if op not in ROOM_OF:
        raise ArgumentError(f"op must be one of the catalogue, got {op!r}")
    if arch is None and not torch.cuda.is_available():
        return f"{op} on the CPU: {_cpu_kernels(op)}"
    arch = arch or _arch(torch.device("cuda", torch.cuda.current_device()))
    if not re.fullmatch(r"sm_\d{2,3}", arch):
        raise ArgumentError(f"arch must be such as sm_90, got {arch!r}")
    if op in EVERYWHERE:
        return f"{op} on {arch}: one implementation for all devices"
    rows = shape_class(op, tuple(shapes[0]) if shapes else ())
    choice = choose(op, arch, rows, _forced.get())
    lines = [f"{op} on {arch}, {rows} rows: {choice.backend} ({choice.reason})"]
    for name, lacking in available(op).items():
        state = lacking or ("can run" if proven(op, name, arch) else f"can run; unproven on {arch}")
        lines.append(f"  {name}: {state}")
    return "\n".join(lines)


def _cpu_kernels(op: str) -> str:
    for name in (op, ROOM_OF[op]):
        try:
            return f"{torch.ops.narrowcast._op_variants(name)} (best first)"
        except RuntimeError:
            continue
    return "its one implementation"
