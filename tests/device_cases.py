"""The cases of tests/fuzz on any device: legal arguments of every op, where a backend runs, and the judgement.

A case is drawn on the CPU: odd sizes, every dtype, every layout, NaN and infinities where they are allowed. Its
tensors are then copied with their strides and their distance from 16-byte boundaries; the reference stays on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fuzz.draw import Draw
from fuzz.hostile import OPS, describe
from fuzz.memory import Memory
from fuzz.spec import Arguments, Op, mismatch
from narrowcast import _register_cuda, dispatch

__all__ = ["OPS", "backends", "cases", "first_case", "refused_case", "run", "to_device", "wrong"]


def backends(op: str) -> list[str]:
    """Those that can run the op here, the reference among them."""
    return [name for name, lacking in dispatch.available(op).items() if not lacking]


def legal_cases(op: Op, seed: int) -> Iterator[Arguments]:
    """Arguments that the contract allows, on the CPU; they live until the next is asked for."""
    memory = Memory()
    for number in itertools.count():
        memory.reset()
        arguments = op.draw(Draw(f"{op.name}.{op.overload}:device:{seed}:{number}", memory))
        if not op.faults(arguments):
            yield arguments


def takes(op: Op, arguments: Arguments, backend: str | None) -> bool:
    """Whether a call is within what the backend declares."""
    return backend not in dict(dispatch.refusals(op.name, dispatch.bind(op.name, (), arguments)))


def cases(op: Op, count: int, seed: int, backend: str | None = None) -> Iterator[Arguments]:
    """Legal arguments that the backend takes, on the CPU; they live until the next is asked for."""
    return itertools.islice((a for a in legal_cases(op, seed) if takes(op, a, backend)), count)


def refused_case(op: Op, seed: int, backend: str) -> Arguments:
    """A legal case beyond the backend's limits."""
    return next(a for a in itertools.islice(legal_cases(op, seed), 200) if not takes(op, a, backend))


def first_case(op: Op, seed: int, backend: str | None = None) -> Arguments:
    """A legal case with finite values and results to compare, which the backend takes."""
    for arguments in cases(op, 200, seed, backend):
        tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
        if all(t.numel() > 0 and bool(t.isfinite().all()) for t in tensors):
            return {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    raise AssertionError(f"{op.name}: no finite case among 200")


def to_device(t: Tensor, device: str) -> Tensor:
    """A copy with the strides and the misalignment of t."""
    extent = 0 if t.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()) if n > 1)
    offset = t.data_ptr() % 16 // t.element_size() if extent else 0
    flat = torch.empty(offset + extent, dtype=t.dtype, device=device)
    flat[offset:].copy_(torch.as_strided(t, (extent,), (1,), t.storage_offset()))
    return torch.as_strided(flat, t.shape, t.stride(), offset)


def placed(arguments: Arguments, device: str) -> Arguments:
    return {n: to_device(v, device) if isinstance(v, Tensor) else v for n, v in arguments.items()}


def run(op: Op, arguments: Arguments, backend: str | None) -> list[Tensor]:
    """The results, or the tensors that an in-place op wrote.

    CUDA tensors take the way of every user, with the backend forced; CPU tensors reach a backend directly (Triton's
    interpreter), and without one the kernels of the CPU.
    """
    device = next(v for v in arguments.values() if isinstance(v, Tensor)).device
    overload: Any = getattr(getattr(torch.ops.narrowcast, op.name), op.overload)
    if backend is None:
        results = overload(**arguments)
    elif device.type == "cuda":
        with dispatch.backend(backend):
            results = overload(**arguments)
    elif op.overload == "out":
        inputs = {n: v for n, v in arguments.items() if n != "out"}
        with dispatch.backend(backend):
            results = _register_cuda._into_out(op.name)(**inputs, out=arguments["out"])
    else:
        results = _register_cuda.implementation(op.name, backend)(**arguments)
    if op.written:
        return [arguments[n] for n in op.written if arguments[n] is not None]
    return [results] if isinstance(results, Tensor) else list(results)


def wrong(op: Op, arguments: Arguments, device: str, backend: str | None) -> str:
    """What is wrong with a backend's results for these arguments (on the CPU); "" when nothing is."""
    wanted = op.reference(arguments)
    moved = placed(arguments, device)
    for i, (got, want) in enumerate(zip(run(op, moved, backend), wanted, strict=True)):
        if got.device.type != device:
            return f"result {i} is on {got.device}: {describe(arguments)}"
        if what := mismatch(got.cpu(), want):
            return f"result {i}: {what}: {describe(arguments)}"
    return ""
