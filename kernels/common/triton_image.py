"""What the Triton kernels over images share: pixels and windows, and images as NHWC memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import describe, fail, require
from .prepared import prepared
from .triton_util import next_power_of_2

#: Offsets of larger images need 64 bits.
NARROW = 2**31 - 1


#: Arguments of the kernels that say where windows lie, as the specifications for compiling ahead name them.
GEOMETRY = (
    "pixels", "out_height", "out_width", "height", "width", "kernel_w", "taps", "stride_h", "stride_w",
    "padding_h", "padding_w", "dilation_h", "dilation_w",
)  # fmt: skip


@triton.jit
def pixel_tile(
    tile, pixels, out_height, out_width, stride_h, stride_w, padding_h, padding_w, INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Output pixels of a tile: their numbers, their image, the input row and column where their windows begin.

    Numbers from ``pixels`` on stand for the last pixel.
    """
    m = tile.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    pixel = tl.minimum(m, pixels - 1)
    column = pixel % out_width
    row = pixel // out_width % out_height
    return m, pixel // out_width // out_height, row * stride_h - padding_h, column * stride_w - padding_w


@triton.jit
def tap_of(image, top, left, u, v, height, width, dilation_h, dilation_w, PADDED: tl.constexpr):
    """Tap (u, v) of windows -> the number of its input pixel, and whether the image has it."""
    row, column = top + u * dilation_h, left + v * dilation_w
    pixel = (image * height + row) * width + column
    if PADDED:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    else:
        inside = row >= row
    return pixel, inside


@triton.jit
def steps_of(taps, depth, MODE: tl.constexpr, BLOCK_K: tl.constexpr):
    return tl.cdiv(taps * depth, BLOCK_K) if MODE == "gathered" else taps * tl.cdiv(depth, BLOCK_K)


@triton.jit
def window_tile(
    step, image, top, left, channels, depth, height, width, kernel_w, taps, dilation_h, dilation_w,
    MODE: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step of a product over taps and channels: offsets into x [M, BLOCK_K], places in a row of weights, masks of both.

    MODE (mode_of): a step is BLOCK_K channels of one tap, or of the only tap, or BLOCK_K successive (tap, channel).
    EVEN: BLOCK_K divides depth.
    """
    ks = tl.arange(0, BLOCK_K)
    if MODE == "gathered":
        at = step * BLOCK_K + ks
        tap, c = at // depth, at % depth
        u, v = tap // kernel_w, tap % kernel_w
        pixel, inside = tap_of(
            image[:, None], top[:, None], left[:, None], u[None, :], v[None, :], height, width, dilation_h, dilation_w,
            PADDED,
        )  # fmt: skip
        in_row = tap < taps
        inside = inside & in_row[None, :]
    else:
        if MODE == "point":  # nothing of the pixels depends on the step
            c = step * BLOCK_K + ks
            at = c
            pixel, inside = tap_of(image, top, left, 0, 0, height, width, dilation_h, dilation_w, PADDED)
        else:
            steps = tl.cdiv(depth, BLOCK_K)
            tap, c = step // steps, step % steps * BLOCK_K + ks
            at = tap * depth + c
            pixel, inside = tap_of(
                image,
                top,
                left,
                tap // kernel_w,
                tap % kernel_w,
                height,
                width,
                dilation_h,
                dilation_w,
                PADDED,
            )
        pixel, inside = pixel[:, None], inside[:, None]
        if EVEN:
            in_row = ks >= 0
        else:
            in_row = c < depth
            inside = inside & in_row[None, :]
    return pixel * channels + c[None, :], at, inside, in_row


#: (tap, channel) pairs per step where channels are too few for a step of one tap.
GATHERED = 32


def mode_of(depth: int, taps: int) -> str:
    """How a product over taps and depth channels is cut into steps."""
    return "gathered" if depth < GATHERED else "taps" if taps > 1 else "point"


@dataclass(frozen=True)
class Window:
    """A checked window over an image: (height, width) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    end: tuple[int, int]  #: padding below and to the right
    dilation: tuple[int, int]
    out: tuple[int, int]

    @property
    def padded(self) -> bool:
        return any((*self.padding, *self.end))


def check_image(op: str, argument: str, x: Tensor, dtypes: Sequence[torch.dtype], names: str) -> None:
    require(
        x.dtype in dtypes and x.dim() == 4, op, f"{argument} must be {names} [N, C, H, W], got {describe(x)}"
    )
    require(
        x.shape[2] >= 1 and x.shape[3] >= 1, op,
        f"{argument} must be [N, C, H, W] with H and W at least 1, got {list(x.shape)}",
    )  # fmt: skip


def _numbers(
    op: str, argument: str, values: Sequence[int], least: int, otherwise: int, four: bool = False
) -> tuple[int, ...]:
    values = list(values) or [otherwise, otherwise]
    count = "2 or 4" if four else "2"
    if str(len(values)) not in count or not all(least <= v < 2**31 for v in values):
        fail(op, f"{argument} must be {count} numbers from {least} to {2**31 - 1}, got {values}")
    return tuple(values)


def window_of(
    op: str, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil: bool = False, source: str = "kernel_size", uneven: bool = False,
) -> Window:  # fmt: skip
    """size: of the image. source: the argument that the kernel's size comes from. uneven: padding may be 4 numbers,
    top, left, bottom and right."""
    k, s = _numbers(op, "kernel_size", kernel, 1, 1), _numbers(op, "stride", stride, 1, 1)
    p, d = _numbers(op, "padding", padding, 0, 0, uneven), _numbers(op, "dilation", dilation, 1, 1)
    p, e = p[:2], p[-2:]
    out = []
    for i in range(2):
        span = size[i] + p[i] + e[i] - d[i] * (k[i] - 1) - 1
        require(
            span >= 0, op,
            f"{source} must fit the padded image, got {k[i]} with dilation {d[i]} on {size[i]} with padding {p[i]} and "
            f"{e[i]}",
        )  # fmt: skip
        positions = (span + s[i] - 1) // s[i] + 1 if ceil else span // s[i] + 1
        # A last window that overhangs counts when it starts inside the image or its left padding.
        out.append(positions - 1 if ceil and (positions - 1) * s[i] >= size[i] + p[i] else positions)
    return Window(k, s, p, e, d, (out[0], out[1]))


def nhwc(x: Tensor) -> Tensor:
    """The image in channels-last memory: itself where it lies so, else a copy."""
    return x.contiguous(memory_format=torch.channels_last)


def filters_nhwc(w: Tensor) -> Tensor:
    """The same of weights, whose copy a plan keeps."""
    if w.is_contiguous(memory_format=torch.channels_last):
        return w
    return prepared("channels last", w, lambda: nhwc(w))


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=torch.channels_last)


def depthwise_tile(channels: int) -> tuple[int, int]:
    """Pixels and channels of a depthwise tile: a warp along channels, 1024 elements in all."""
    columns = min(128, max(16, next_power_of_2(channels)))
    return 1024 // columns, columns


def index_type(*tensors: Tensor | None):
    """The integer type that offsets into these tensors need."""
    return tl.int64 if any(t is not None and t.numel() > NARROW for t in tensors) else tl.int32
