"""Argument checks of the launchers written in Python: the wording of ``NC_CHECK`` in check.h."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh")


def fail(op: str, text: str) -> NoReturn:
    raise RuntimeError(f"{op}: {text}")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(t: Tensor | None) -> str:
    return "nothing" if t is None else f"{name(t.dtype)} {list(t.shape)}"


def require(condition: bool, op: str, text: str) -> None:
    """Raises ``<op>: <text>``; the text is ``<argument> must be <expectation>, got <value>``."""
    if not condition:
        fail(op, text)


def require_floating(op: str, argument: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        fail(op, f"{argument} must be float32, float16 or bfloat16, got {name(t.dtype)}")


def require_rows(op: str, argument: str, t: Tensor) -> None:
    if t.dim() < 1:
        fail(op, f"{argument} must have at least one dimension, got a scalar")


def require_group(op: str, group_size: int, columns: int) -> None:
    if group_size < 0 or (group_size and columns % group_size):
        fail(
            op,
            f"group_size must be 0 (one scale per token) or divide the last dimension {columns}, got {group_size}",
        )


def require_tensor(op: str, argument: str, t: Tensor, shape: tuple, dtypes: tuple, device) -> None:
    """A tensor of one of the dtypes, of exactly this shape, where the op's other tensors are."""
    if t.dtype not in dtypes or tuple(t.shape) != tuple(shape):
        names = " or ".join(name(d) for d in dtypes)
        fail(op, f"{argument} must be {names} {list(shape)}, got {describe(t)}")
    require_device(op, argument, t, device)


def require_device(op: str, argument: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        fail(op, f"{argument} must be on {device}, got {t.device}")


def require_activation(op: str, argument: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        fail(
            op,
            f"{argument} must be none, relu, relu6, hardswish, silu, gelu or gelu_tanh, got '{activation}'",
        )


def require_scale(op: str, argument: str, scale: float) -> float:
    """1 / scale, rounded as float32 division rounds it."""
    inverse = float(1 / torch.tensor(scale, dtype=torch.float32)) if scale else math.inf
    if not (math.isfinite(scale) and math.isfinite(inverse) and inverse != 0):
        fail(op, f"{argument} must be finite and not 0, got {scale}")
    return inverse


def rows_of(t: Tensor) -> Tensor:
    """[..., K] as [rows, K] with adjacent elements: a view where the strides allow it, else a copy."""
    rows = t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty((t.shape[:-1].numel(), t.shape[-1]))
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()
