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
    inverse = float(1 / torch.tensor(scale, dtype=torch.float32, device="cpu")) if scale else math.inf
    if not (math.isfinite(scale) and math.isfinite(inverse) and inverse != 0):
        fail(op, f"{argument} must be finite and not 0, got {scale}")
    return inverse


def require_epilogue(
    op: str, x: Tensor, columns: int, bias: Tensor | None, activation: str, residual: Tensor | None,
    post_activation: str,
) -> None:  # fmt: skip
    """What follows a product of x [..., K] with N = ``columns``."""
    require_activation(op, "activation", activation)
    require_activation(op, "post_activation", post_activation)
    if bias is not None:
        if bias.dtype not in FLOATING or tuple(bias.shape) != (columns,):
            fail(
                op,
                f"bias must be float32, float16 or bfloat16 [N] = [{columns}], got {describe(bias)}",
            )
        require_device(op, "bias", bias, x.device)
    if residual is not None:
        shape = [*x.shape[:-1], columns]
        if residual.dtype not in FLOATING or list(residual.shape) != shape:
            fail(op, f"residual must be float32, float16 or bfloat16 {shape}, got {describe(residual)}")
        require_device(op, "residual", residual, x.device)


def require_out_floating(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        fail(op, f"out_dtype must be float32, float16 or bfloat16, got {name(dtype)}")


def require_requantise(op: str, out_scale: float, out_zero_point: int, dtype: torch.dtype) -> float:
    """1 / out_scale, rounded as float32 division rounds it."""
    if dtype not in (torch.int8, torch.uint8):
        fail(op, f"out_dtype must be int8 or uint8, got {name(dtype)}")
    inverse = float(1 / torch.tensor(out_scale, dtype=torch.float32, device="cpu")) if out_scale > 0 else 0.0
    if not (math.isfinite(inverse) and inverse > 0):
        fail(op, f"out_scale must be positive and finite, and so its inverse, got {out_scale}")
    low = -128 if dtype == torch.int8 else 0
    if not low <= out_zero_point <= low + 255:
        fail(op, f"out_zero_point must be within {low} and {low + 255}, got {out_zero_point}")
    return inverse


def rows_of(t: Tensor) -> Tensor:
    """[..., K] as [rows, K] with adjacent elements: a view where the strides allow it, else a copy."""
    rows = t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty((t.shape[:-1].numel(), t.shape[-1]))
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()
