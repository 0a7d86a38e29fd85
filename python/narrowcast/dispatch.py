"""Which backend serves an op on a CUDA device: the table, and the reasons.

C++ serves CPU tensors. For CUDA tensors every op of the catalogue has one Python implementation (_register_cuda.py),
which asks :func:`serving` per call:

- ``cuda``: the compiled kernel, private op ``_<op>_cuda`` of the CUDA library.
- ``triton``: the function named as the op in a ``<room>/*_triton.py`` file, compiled when first used.
- ``reference``: the kernels of the CPU, on copies. Slow, and always right.

By default only a backend takes part that has passed its tests on this architecture (``proven.json``, written from
test runs on real devices; a row whose kernels have changed since is void). ``NARROWCAST_BACKEND``, or
``with narrowcast.backend("triton"):``, uses one without that proof, and raises where an op lacks it.
A backend that takes less than the op's contract says so in its room (``LIMITS``); a call beyond that goes to the next.
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
from collections.abc import Iterator, Mapping, Sequence
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
from .kernels.common.limits import Limit

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


# What a call is made of


@functools.cache
def _template(op: str) -> dict[str, Any]:
    schema = getattr(torch.ops.narrowcast, op).default._schema.arguments
    return {a.name: a.default_value if a.has_default_value() else None for a in schema}


def bind(op: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, in the order of the schema, defaults included."""
    return {**_template(op), **dict(zip(_template(op), arguments)), **options}


@functools.cache
def limits(op: str) -> dict[str, tuple[Limit, ...]]:
    """Backend -> what it takes less than the contract; as declared in the op's room."""
    room = importlib.import_module(f"{__package__}.kernels.{ROOM_OF[op]}")
    return getattr(room, "LIMITS", {})


def refusals(op: str, given: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(backend, why it does not take this call), for those that do not."""
    found = []
    for name, declared in limits(op).items():
        if reason := next((text for limit in declared if (text := limit.refusal(given))), ""):
            found.append((name, reason))
    return tuple(found)


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
        yield base / "__init__.py"
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
    # Tests draw what the limits allow: wider ones ask for a new proof.
    contents.append(("limits", "; ".join(map(str, limits(op).get(backend, ()))).encode()))
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
def choose(
    op: str,
    arch: str,
    rows: str,
    forced: str | None,
    measured: str | None = None,
    refused: tuple[tuple[str, str], ...] = (),
) -> Choice:
    """The backend for an op, with the reason. Raises RuntimeError if the forced one cannot run.

    refused: as :func:`refusals` tells them.
    """
    lacking = available(op)
    lacking |= {name: reason for name, reason in refused if not lacking[name]}
    passed_over = "".join(f"; {name}: {lacking[name]}" for name, _ in refused)
    if forced:
        if lacking[forced]:
            able = ", ".join(b for b, reason in lacking.items() if not reason)
            raise RuntimeError(f"{op}: backend must be one of {able}, got {forced}: {lacking[forced]}")
        return Choice(forced, ASKED_FOR)
    able = [b for b in _order(op, arch, rows) if not lacking[b]]
    trusted = [b for b in able if proven(op, b, arch)]
    if measured in trusted:
        reason = f"the fastest of {', '.join(trusted)} when measured on this machine"
        return Choice(measured, reason + passed_over)
    if trusted:
        reason = f"first of {', '.join(trusted)} by the table, for {rows} rows on {arch}"
        return Choice(trusted[0], reason + passed_over)
    if able:
        return Choice(
            "reference",
            f"{' and '.join(able)} can run but passed no tests on {arch} yet; "
            f"NARROWCAST_BACKEND={able[0]} uses it all the same{passed_over}",
        )
    return Choice("reference", "; ".join(f"{b}: {lacking[b]}" for b in ("cuda", "triton")))


def _arch(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _kernels(op: str) -> str:
    """Of all backends: what was measured of others says nothing about these."""
    return hashlib.sha256(repr([source_hash(op, b) for b in DEFAULT_ORDER]).encode()).hexdigest()[:8]


def _key(op: str, rows: str, dtypes: Sequence[torch.dtype]) -> str:
    """Of the tuning table."""
    kinds = " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes[:3])
    return f"backend {op} {_kernels(op)} {rows} {kinds}"


def serving(op: str, given: Mapping[str, Any], device: torch.device | None = None) -> Choice:
    """The choice for a call with these arguments (see :func:`bind`).

    device: where it will run, when the tensors are elsewhere (on ``meta``).
    """
    refused = refusals(op, given) if limits(op) else ()
    if forced := _forced.get():
        return choose(op, "", "", forced, None, refused)
    tensors = [v for v in given.values() if isinstance(v, Tensor)]
    device = device or tensors[0].device
    rows = shape_class(op, tensors[0].shape)
    measured = tuning.table(device.index).get(_key(op, rows, [t.dtype for t in tensors]))
    return choose(op, _arch(device), rows, None, measured, refused)


def forced() -> str | None:
    """The backend that this thread or task asks for, by the environment or ``with backend(...)``."""
    return _forced.get()


def is_trusted(op: str, device: torch.device) -> bool:
    """Whether a backend of a GPU serves an op without being asked for, or one is asked for."""
    if forced := _forced.get():
        return forced != "reference"
    return any(not available(op)[b] and proven(op, b, _arch(device)) for b in DEFAULT_ORDER)


def measure(op: str, *arguments: Any, **options: Any) -> dict[str, float]:
    """Times every proven backend of an op on these CUDA tensors and remembers the best for this GPU model.

    Returns backend -> milliseconds. Later calls of its shape class and dtypes use the fastest.
    """
    given = bind(op, arguments, options)
    tensors = [v for v in given.values() if isinstance(v, Tensor)]
    if not tensors or not tensors[0].is_cuda:
        raise ArgumentError(f"{op}: arguments must begin with a tensor on a GPU")
    function, times, refused = getattr(torch.ops.narrowcast, op), {}, dict(refusals(op, given))
    for name in DEFAULT_ORDER:
        able = not available(op)[name] and name not in refused
        if able and proven(op, name, _arch(tensors[0].device)):
            with backend(name):
                times[name] = tuning.milliseconds(lambda: function(*arguments, **options))
    if times:
        key = _key(op, shape_class(op, tensors[0].shape), [t.dtype for t in tensors])
        tuning.table(tensors[0].device.index).put(key, min(times, key=times.__getitem__))
    return times


@dataclass(frozen=True)
class Operand:
    """A tensor that is only spoken of; a dtype of None is any."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def _spoken_of(op: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[Any], options: Mapping) -> dict:
    given, schema = dict(_template(op)), getattr(torch.ops.narrowcast, op).default._schema.arguments
    if unknown := set(options) - set(given):
        raise ArgumentError(f"{op} must be explained by arguments of its own, got {sorted(unknown)[0]!r}")
    names = [a.name for a in schema if "Tensor" in str(a.type)]
    kinds = [getattr(torch, d) if isinstance(d, str) else d for d in dtypes]
    for i, (argument, shape) in enumerate(zip(names, shapes)):
        given[argument] = Operand(tuple(shape), kinds[i] if i < len(kinds) else None)
    return given | dict(options)


def explain(
    op: str,
    shapes: Sequence[Sequence[int]] = (),
    arch: str | None = None,
    *,
    dtypes: Sequence[torch.dtype | str] = (),
    **options: Any,
) -> str:
    """Which backend serves an op for arguments of these shapes, and why, as text.

    shapes, dtypes: of the tensors, in the order of the schema; a dtype left out is taken to be one that every backend
        knows. arch: such as "sm_90"; by default that of the current GPU, or the CPU where there is none.
    options: arguments that are no tensors, such as ``activation_bits=8``.
    """
    if op not in ROOM_OF:
        raise ArgumentError(f"op must be one of the catalogue, got {op!r}")
    given = _spoken_of(op, shapes, dtypes, options)
    if arch is None and not torch.cuda.is_available():
        return f"{op} on the CPU: {_cpu_kernels(op)}"
    here = None if arch else torch.cuda.current_device()
    arch = arch or _arch(torch.device("cuda", here))
    if not re.fullmatch(r"sm_\d{2,3}", arch):
        raise ArgumentError(f"arch must be such as sm_90, got {arch!r}")
    if op in EVERYWHERE:
        return f"{op} on {arch}: one implementation for all devices"
    rows = shape_class(op, tuple(shapes[0]) if shapes else ())
    refused, operands = refusals(op, given), [v for v in given.values() if isinstance(v, Operand)]
    measured = None
    if here is not None and operands and len(dtypes) >= min(3, len(operands)):
        measured = tuning.table(here).get(_key(op, rows, [o.dtype for o in operands if o.dtype]))
    choice = choose(op, arch, rows, _forced.get(), measured, refused)
    lines = [f"{op} on {arch}, {rows} rows: {choice.backend} ({choice.reason})"]
    for name, lacking in available(op).items():
        state = lacking or dict(refused).get(name)
        if not state:
            state = "can run" if proven(op, name, arch) else f"can run; unproven on {arch}"
            state += "".join(f"; {limit}" for limit in limits(op).get(name, ()))
        lines.append(f"  {name}: {state}")
    return "\n".join(lines)


def _cpu_kernels(op: str) -> str:
    for name in (op, ROOM_OF[op]):
        try:
            return f"{torch.ops.narrowcast._op_variants(name)} (best first)"
        except RuntimeError:
            continue
    return "its one implementation"
