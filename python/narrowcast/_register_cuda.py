"""Registers every op for CUDA tensors: one Python implementation each, which runs the backend that dispatch.py chose."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .kernels.quantize import findings_of

_ops = torch.ops.narrowcast


def _device_of(given: dict[str, Any]) -> torch.device:
    return next(v for v in given.values() if isinstance(v, Tensor)).device


def _in_triton(op: str) -> Callable:
    return getattr(importlib.import_module(dispatch.triton_module(op)), op)


def _compiled(op: str) -> Callable:
    """The private op. What it finds in x (NaN, infinity) is counted, and refused when the call is strict."""
    private = getattr(_ops, f"_{op}_cuda").default
    wanted = [a.name for a in private._schema.arguments]

    def call(*arguments: Any, **options: Any) -> Any:
        given = dispatch.bind(op, arguments, options)
        if "findings" not in wanted:
            return private(*(given[name] for name in wanted))
        with findings_of(op, _device_of(given), given.get("strict", False)) as findings:
            given["findings"] = findings
            return private(*(given[name] for name in wanted))

    return call


def _on_the_cpu(op: str) -> Callable:
    overload = getattr(_ops, op).default
    written = [a.name for a in overload._schema.arguments if a.alias_info and a.alias_info.is_write]

    def call(*arguments: Any, **options: Any) -> Any:
        given = dispatch.bind(op, arguments, options)
        device = _device_of(given)
        copies = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in given.items()}
        result = overload(**copies)
        for name in written:
            if given[name] is not None:
                given[name].copy_(copies[name])
        if isinstance(result, Tensor):
            return result.to(device)
        return result and tuple(t.to(device) for t in result)

    return call


@functools.cache
def implementation(op: str, backend: str) -> Callable:
    """A backend's function for an op, with the arguments of its schema."""
    return {"triton": _in_triton, "cuda": _compiled, "reference": _on_the_cpu}[backend](op)


@functools.cache
def _warn(op: str, reason: str) -> None:
    warnings.warn(f"{op}: runs on copies on the CPU: {reason}", RuntimeWarning, stacklevel=5)


def _run(op: str, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    choice = dispatch.serving(op, dispatch.bind(op, arguments, options))
    if choice.backend == "reference" and choice.reason != dispatch.ASKED_FOR:
        _warn(op, choice.reason)
    return implementation(op, choice.backend)(*arguments, **options)


def _functional(op: str) -> Callable:
    return lambda *arguments, **options: _run(op, arguments, options)


def _text(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"


def _into_out(op: str) -> Callable:
    """``op.out``: the result is copied there, so it may overlap the inputs and have any strides."""
    packet = getattr(_ops, op)
    names = [a.name for a in packet.out._schema.arguments]
    typed = any(a.name == "out_dtype" for a in packet.default._schema.arguments)

    def call(*arguments: Any, out: Tensor, **options: Any) -> None:
        given = {**dict(zip(names, arguments)), **options}
        if typed:
            given["out_dtype"] = out.dtype
        result = _run(op, (), given)
        if (out.shape, out.dtype, out.device) != (result.shape, result.dtype, result.device):
            raise RuntimeError(f"{op}: out must be {_text(result)}, got {_text(out)}")
        out.copy_(result)

    return call


def register() -> torch.library.Library:
    """Every overload of the catalogue. The library lives as long as the registrations must."""
    library = torch.library.Library("narrowcast", "IMPL")
    for op in dispatch.ROOM_OF:
        if op in dispatch.EVERYWHERE:
            continue
        library.impl(op, _functional(op), "CUDA")
        if "out" in getattr(_ops, op).overloads():
            library.impl(f"{op}.out", _into_out(op), "CUDA")
    return library


_library = register()
