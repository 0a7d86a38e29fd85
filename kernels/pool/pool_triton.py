"""The int8 pools on GPUs, over NHWC images: a program takes some pixels, some channels and some taps at a time.

The contract is pool.h; the bits are those of every other backend. Small windows take many pixels and one tap at a
time; where one window covers much of the image, the tile lies along its taps instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import FLOATING, name, require
from ..common.triton_image import (
    GEOMETRY,
    Window,
    check_image,
    empty_nhwc,
    index_type,
    nhwc,
    pixel_tile,
    tap_of,
    window_of,
)
from ..common.triton_util import ahead, launch, next_power_of_2, store

BYTES = (torch.uint8, torch.int8)
MOST_TAPS = 1 << 22  # 2^22 * 510 < 2^31


@triton.jit
def _pool(
    x, out, pixels, out_height, out_width, height, width, channels, kernel_w, taps,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    x_scale, x_zero_point, inverse_out_scale, out_zero_point,
    MAXIMUM: tl.constexpr, INDEX: tl.constexpr, PIXELS: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    tile_m = tl.program_id(0) // tiles
    m, image, top, left = pixel_tile(
        tile_m, pixels, out_height, out_width, stride_h, stride_w, padding_h, padding_w, INDEX, PIXELS
    )
    lowest: tl.constexpr = 0 if x.dtype.element_ty == tl.uint8 else -128
    acc = tl.full((PIXELS, CHANNELS), lowest if MAXIMUM else 0, tl.int32)
    count = tl.zeros((PIXELS,), tl.int32)
    for first in range(0, taps, TAPS):
        tap = first + tl.arange(0, TAPS)
        pixel, inside = tap_of(
            image[:, None], top[:, None], left[:, None], (tap // kernel_w)[None, :], (tap % kernel_w)[None, :],
            height, width, dilation_h, dilation_w, True,
        )  # fmt: skip
        inside = inside & (tap < taps)[None, :]
        at = x + pixel[:, :, None] * channels + c[None, None, :]
        mask = inside[:, :, None] & (c < channels)[None, None, :]
        if MAXIMUM:
            acc = tl.maximum(acc, tl.max(tl.load(at, mask=mask, other=lowest).to(tl.int32), 1))
        else:
            acc += tl.sum(tl.load(at, mask=mask, other=x_zero_point).to(tl.int32) - x_zero_point, 1)
            count += tl.sum(inside.to(tl.int32), 1)
    stored = (m < pixels)[:, None] & (c < channels)[None, :]
    to = out + m.to(tl.int64)[:, None] * channels + c[None, :]
    if MAXIMUM:
        tl.store(to, acc.to(out.dtype.element_ty), mask=stored)
    else:
        scale = tl.div_rn(x_scale + tl.zeros((PIXELS,), tl.float32), count.to(tl.float32))
        store(to, acc.to(tl.float32) * scale[:, None], stored, inverse_out_scale, out_zero_point)


def _reached(window: Window, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last + 1 tap along either axis that some window has inside the image: padding may dwarf it."""
    ranges = []
    for k, s, p, d, positions, length in zip(
        window.kernel, window.stride, window.padding, window.dilation, window.out, size
    ):
        first = max(0, -(-(p - (positions - 1) * s) // d))
        last = min(k, (length - 1 + p) // d + 1)
        ranges.append((min(first, last), last))
    return ranges[0], ranges[1]


def _run(
    x: Tensor, window: Window, dtype: torch.dtype, maximum: bool, x_scale: float = 1.0, x_zero_point: int = 0,
    inverse_out_scale: float = 1.0, out_zero_point: int = 0,
) -> Tensor:  # fmt: skip
    n, channels, *size = x.shape
    out = empty_nhwc(x, (n, channels, *window.out), dtype)
    if out.numel() == 0:
        return out
    x = nhwc(x)
    rows, columns = _reached(window, size)
    kernel = (rows[1] - rows[0], columns[1] - columns[0])
    padding = (
        window.padding[0] - rows[0] * window.dilation[0], window.padding[1] - columns[0] * window.dilation[1]
    )  # fmt: skip
    pixels, taps = n * math.prod(window.out), math.prod(kernel)
    block = min(128, max(16, next_power_of_2(channels)))
    along = 1 if taps <= 16 else min(64, next_power_of_2(taps))
    across = max(1, min(1024 // (block * along), next_power_of_2(pixels)))
    launch(
        _pool, (triton.cdiv(pixels, across) * triton.cdiv(channels, block),),
        x, out, pixels, *window.out, *size, channels, kernel[1], taps, *window.stride, *padding, *window.dilation,
        x_scale, x_zero_point, inverse_out_scale, out_zero_point, maximum, index_type(x, out), across, along, block,
        on=x,
    )  # fmt: skip
    return out


def _check_padding(op: str, window: Window) -> None:
    for padding, kernel in zip(window.padding, window.kernel):
        require(
            padding <= kernel // 2, op,
            f"padding must be at most half of kernel_size, got {padding} for {kernel}",
        )  # fmt: skip


def max_pool2d_int8(
    x_q: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1), ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """The largest code in each window: the room's page has shapes and errors."""
    op = "max_pool2d_int8"
    check_image(op, "x_q", x_q, BYTES, "int8 or uint8")
    require(len(kernel_size) > 0, op, "kernel_size must be 2 numbers, got none")
    require(len(stride) > 0, op, "stride must be 2 numbers, got none")
    window = window_of(op, x_q.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    _check_padding(op, window)
    return _run(x_q, window, x_q.dtype, True)


def _in_range(value: int, dtype: torch.dtype) -> bool:
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def avg_pool2d_int8(
    x_q: Tensor, x_scale: float, x_zero_point: int, kernel_size: Sequence[int] = (), stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0), out_scale: float = 0.0, out_zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The mean of each window's pixels inside the image: the room's page has shapes and errors."""
    op = "avg_pool2d_int8"
    check_image(op, "x_q", x_q, BYTES, "int8 or uint8")
    whole = len(kernel_size) == 0
    require(
        not whole or len(stride) == 0, op,
        f"stride must be empty when kernel_size is, got {len(stride)} numbers",
    )  # fmt: skip
    size = x_q.shape[2:]
    kernel = size if whole else kernel_size
    window = window_of(op, size, kernel, stride if len(stride) else kernel, padding, ())
    _check_padding(op, window)
    require(
        not whole or window.padding == (0, 0), op,
        f"padding must be 0 when kernel_size is empty, got {window.padding[0]} and {window.padding[1]}",
    )  # fmt: skip
    require(
        min(window.kernel[0], size[0]) * min(window.kernel[1], size[1]) <= MOST_TAPS, op,
        f"kernel_size must cover at most 2^22 pixels, got {window.kernel[0]} x {window.kernel[1]}",
    )  # fmt: skip
    require(
        _in_range(x_zero_point, x_q.dtype), op,
        f"x_zero_point must be a code of x_q's dtype {name(x_q.dtype)}, got {x_zero_point}",
    )  # fmt: skip
    scale = torch.tensor(out_scale, dtype=torch.float64).float()
    inverse = float(1 / scale)
    require(
        out_scale == 0 or (scale > 0 and math.isfinite(scale) and math.isfinite(inverse)), op,
        f"out_scale must be 0 (float output), or positive and finite, and so its inverse, got {out_scale}",
    )  # fmt: skip
    out_dtype = out_dtype or (torch.float32 if out_scale == 0 else torch.uint8)
    if out_scale == 0:
        require(
            out_dtype in FLOATING, op,
            f"out_dtype must be float32, float16 or bfloat16 when out_scale is 0, got {name(out_dtype)}",
        )  # fmt: skip
        return _run(x_q, window, out_dtype, False, x_scale, x_zero_point)
    require(
        out_dtype in BYTES and _in_range(out_zero_point, out_dtype), op,
        "out_dtype must be uint8 or int8, and out_zero_point one of its codes, "
        f"got {name(out_dtype)} and {out_zero_point}",
    )  # fmt: skip
    return _run(x_q, window, out_dtype, False, x_scale, x_zero_point, inverse, out_zero_point)


def _ahead(out: str, maximum: bool, pixels: int, taps: int):
    return ahead(
        _pool,
        {"x": "*u8", "out": f"*{out}", "channels": "i32:16", "x_scale": "fp32", "inverse_out_scale": "fp32"}
        | dict.fromkeys((*GEOMETRY, "x_zero_point", "out_zero_point"), "i32")
        | {"MAXIMUM": maximum, "INDEX": tl.int32, "PIXELS": pixels, "TAPS": taps, "CHANNELS": 128},
    )  # fmt: skip


AOT = [_ahead("u8", True, 8, 1), _ahead("u8", False, 8, 1), _ahead("fp32", False, 1, 64)]
