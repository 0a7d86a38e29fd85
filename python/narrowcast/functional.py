"""Every op as a function of torch tensors, NumPy or CuPy arrays, or any other DLPack producer.

    import numpy as np
    from narrowcast import functional as NF

    q, scale = NF.quantize_int8(np.random.randn(4, 64).astype(np.float32))   # NumPy in, NumPy out

Arguments and errors are those of the op's room (``help(NF.rms_norm)``). A result has the kind of the
first array given. Memory is shared both ways where DLPack allows it; a read-only array or one with
negative strides is copied, unless the op writes to it, which is an error. Where the op takes a
dtype, NumPy's are understood as well.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .errors import ArgumentError

#: Room -> its ops. A test holds this list against the catalogue of schemas.
ROOMS = {
    "quantize": ("quantize_int8", "quantize_int8_asymmetric", "quantize_int8_static", "nan_count"),
    "dequantize": ("dequantize_int8", "dequantize_groups", "dequantize_gguf"),
    "linear": ("linear",),
    "linear_int8": ("linear_int8", "linear_int8_requantize", "linear_dynamic_int8"),
    "linear_grouped": ("linear_grouped",),
    "attention": ("attention", "attention_lse"),
    "attention_int8": ("attention_int8",),
    "attention_decode": ("attention_decode",),
    "kv_append": ("kv_append",),
    "conv2d": ("conv2d",),
    "conv2d_int8": ("conv2d_int8",),
    "pool": ("max_pool2d_int8", "avg_pool2d_int8"),
    "norm": (
        "rms_norm", "add_rms_norm", "rms_norm_int8", "add_rms_norm_int8",
        "layer_norm", "add_layer_norm", "layer_norm_int8", "add_layer_norm_int8",
    ),
    "rope": ("rope",),
    "gated_act": ("silu_mul", "silu_mul_int8", "gelu_mul", "gelu_mul_int8"),
}  # fmt: skip


def _tensor(op: str, argument: str, value: Any, written: bool) -> torch.Tensor | None:
    if value is None or isinstance(value, torch.Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise ArgumentError(
            f"{op}: {argument} must be a tensor or an array that speaks DLPack, got {type(value).__name__}"
        )
    if isinstance(value, np.ndarray) and (not value.flags.writeable or min(value.strides, default=0) < 0):
        if written:
            raise ArgumentError(
                f"{op}: {argument} must be writable, without negative strides: the op updates it in place"
            )
        value = value.copy()
    return torch.from_dlpack(value)


def _dtype(op: str, argument: str, value: Any) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    try:
        dtype = getattr(torch, value if isinstance(value, str) else np.dtype(value).name)
    except (AttributeError, TypeError):
        dtype = None
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"{op}: {argument} must be a dtype of torch or NumPy, got {value!r}")
    return dtype


def _like(op: str, first: Any, result: Any) -> Any:
    """The tensors of a result as arrays of the kind of `first`."""
    if isinstance(result, (tuple, list)):
        return tuple(_like(op, first, part) for part in result)
    if not isinstance(result, torch.Tensor) or first is None or isinstance(first, torch.Tensor):
        return result
    if isinstance(first, np.ndarray):
        if result.dtype == torch.bfloat16:
            raise ArgumentError(f"{op}: out_dtype must be one that NumPy has, got bfloat16")
        return result.numpy()
    if hasattr(first, "__array_namespace__"):
        library = first.__array_namespace__()
    else:
        library = importlib.import_module(type(first).__module__.partition(".")[0])
    return library.from_dlpack(result)


def _signature(schema: torch.FunctionSchema) -> inspect.Signature:
    kinds = {True: inspect.Parameter.KEYWORD_ONLY, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return inspect.Signature(
        [
            inspect.Parameter(
                a.name,
                kinds[a.kwarg_only],
                default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
            )
            for a in schema.arguments
        ]
    )


def _function(room: str, op: str) -> Callable:
    overload = getattr(torch.ops.narrowcast, op).default
    schema = overload._schema
    target: Callable = overload
    signature = _signature(schema)
    try:
        target = getattr(importlib.import_module(f"{__package__}.kernels.{room}"), op)
        signature = inspect.signature(target)
    except (ModuleNotFoundError, AttributeError):
        pass  # a room without a Python function of its own is called through its op
    tensors, dtypes = {}, set()
    for a in schema.arguments:
        if "Tensor" in str(a.type):
            tensors[a.name] = a.alias_info is not None and a.alias_info.is_write
        elif a.name == "dtype" or a.name.endswith("_dtype"):
            dtypes.add(a.name)

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        first = next((given[name] for name in tensors if given.get(name) is not None), None)
        for name, value in given.items():
            if name in tensors:
                given[name] = _tensor(op, name, value, tensors[name])
            elif name in dtypes:
                given[name] = _dtype(op, name, value)
        return _like(op, first, target(*bound.args, **bound.kwargs))

    if target is not overload:
        functools.update_wrapper(call, target)
    else:
        call.__doc__ = f"``{schema}``"
    call.__name__ = call.__qualname__ = op
    call.__module__ = __name__
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


globals().update({op: _function(room, op) for room, ops in ROOMS.items() for op in ops})
__all__ = [op for ops in ROOMS.values() for op in ops]
