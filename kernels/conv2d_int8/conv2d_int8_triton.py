"""conv2d_int8 on GPUs: an implicit int8 product over taps and channels of NHWC images, and a depthwise kernel.

The contract is conv2d_int8.h, and the bits are those of every other backend. uint8 pixels enter the product as
int8, 128 lower; what zero points add is taken off by the sum of each filter's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import (
    FLOATING,
    describe,
    name,
    require,
    require_activation,
    require_device,
    require_scale,
)
from ..common.prepared import prepared
from ..common.triton_image import (
    GATHERED,
    GEOMETRY,
    check_image,
    depthwise_tile,
    empty_nhwc,
    filters_nhwc,
    index_type,
    mode_of,
    nhwc,
    pixel_tile,
    steps_of,
    tap_of,
    window_of,
    window_tile,
)  # fmt: skip
from ..common.triton_tiles import LARGE, SMALL, gemm_config, gemm_configs, shape_class
from ..common.triton_util import activate, ahead, launch, store, tile_of, tuned

OP = "conv2d_int8"
BYTES = (torch.uint8, torch.int8)


@triton.jit
def _finish(
    acc, m, n, in_m, in_n, w_scale, bias, residual, out, channels,
    x_scale, residual_scale, residual_zero_point, inverse_out_scale, out_zero_point,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr,
):  # fmt: skip
    """int32 sums of a tile -> results: pixels m (int64) x channels n."""
    inside = in_m[:, None] & in_n[None, :]
    at = m[:, None] * channels + n[None, :]
    if PER_CHANNEL:
        scale = tl.load(w_scale + n, mask=in_n, other=0.0) * x_scale
    else:
        scale = tl.load(w_scale) * x_scale + tl.zeros(n.shape, tl.float32)
    v = acc.to(tl.float32) * scale[None, :]
    if bias is not None:
        v = v + tl.load(bias + n, mask=in_n, other=0.0)[None, :]
    v = activate(v, ACTIVATION)
    if residual is not None:
        r = tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        v = v + (r - residual_zero_point) * residual_scale
    v = activate(v, POST_ACTIVATION)
    store(out + at, v, inside, inverse_out_scale, out_zero_point)


@triton.jit
def _sum_weights(w, total, K, BLOCK: tl.constexpr):
    """int32 sums of the rows of w [O, K]."""
    row = w + tl.program_id(0).to(tl.int64) * K
    acc = tl.zeros((BLOCK,), tl.int32)
    for k in range(0, K, BLOCK):
        at = k + tl.arange(0, BLOCK)
        acc += tl.load(row + at, mask=at < K, other=0).to(tl.int32)
    tl.store(total + tl.program_id(0), tl.sum(acc, 0))


@triton.jit
def _conv2d_int8(
    x, w, w_sum, w_scale, bias, residual, out, x_scale, x_zero_point, residual_scale, residual_zero_point,
    inverse_out_scale, out_zero_point,
    pixels, out_height, out_width, height, width, channels, out_channels, depth, columns, kernel_w, taps,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
    MODE: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output pixels x BLOCK_N output channels of one group, which has depth channels in and columns out.

    w_sum is None where the zero point of the int8 pixels is 0.
    """
    tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m, image, top, left = pixel_tile(
        tile_m, pixels, out_height, out_width, stride_h, stride_w, padding_h, padding_w, INDEX, BLOCK_M
    )
    w_row = w + (group * columns + tl.minimum(n, columns - 1)).to(tl.int64)[:, None] * (taps * depth)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(steps_of(taps, depth, MODE, BLOCK_K)):
        x_at, w_at, inside, in_row = window_tile(
            step, image, top, left, channels, depth, height, width, kernel_w, taps, dilation_h, dilation_w,
            MODE, PADDED, EVEN, BLOCK_K,
        )  # fmt: skip
        a = tl.load(x + group * depth + x_at, mask=inside, other=x_zero_point)
        b = tl.load(w_row + w_at[None, :], mask=in_row[None, :], other=0)
        if x.dtype.element_ty == tl.uint8:
            a = (a ^ 128).to(tl.int8, bitcast=True)
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
    if w_sum is not None:
        zero = x_zero_point - 128 if x.dtype.element_ty == tl.uint8 else x_zero_point
        acc -= (tl.load(w_sum + group * columns + n, mask=n < columns, other=0) * zero)[None, :]
    _finish(
        acc, m.to(tl.int64), group * columns + n, m < pixels, n < columns, w_scale, bias, residual, out, out_channels,
        x_scale, residual_scale, residual_zero_point, inverse_out_scale, out_zero_point,
        PER_CHANNEL, ACTIVATION, POST_ACTIVATION,
    )  # fmt: skip


@triton.jit
def _depthwise_int8(
    x, w, w_scale, bias, residual, out, x_scale, x_zero_point, residual_scale, residual_zero_point,
    inverse_out_scale, out_zero_point,
    pixels, out_height, out_width, height, width, channels, kernel_w, taps,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels x BLOCK_N channels, each channel by its own filter."""
    tiles_n = tl.cdiv(channels, BLOCK_N)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    m, image, top, left = pixel_tile(
        tile_m, pixels, out_height, out_width, stride_h, stride_w, padding_h, padding_w, INDEX, BLOCK_M
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tap in range(taps):
        pixel, inside = tap_of(
            image, top, left, tap // kernel_w, tap % kernel_w, height, width, dilation_h, dilation_w, PADDED
        )
        mask = inside[:, None] & (n < channels)[None, :]
        a = tl.load(x + pixel[:, None] * channels + n[None, :], mask=mask, other=x_zero_point).to(tl.int32)
        b = tl.load(w + n.to(tl.int64) * taps + tap, mask=n < channels, other=0).to(tl.int32)
        acc += (a - x_zero_point) * b[None, :]
    _finish(
        acc, m.to(tl.int64), n, m < pixels, n < channels, w_scale, bias, residual, out, channels,
        x_scale, residual_scale, residual_zero_point, inverse_out_scale, out_zero_point,
        PER_CHANNEL, ACTIVATION, POST_ACTIVATION,
    )  # fmt: skip


def is_code(value: int, dtype: torch.dtype) -> bool:
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _check_scale(argument: str, scale: float) -> None:
    as_float32 = float(torch.tensor(scale, dtype=torch.float64).float())
    require(
        math.isfinite(as_float32) and as_float32 != 0, OP, f"{argument} must be finite and not 0, got {scale}"
    )


def _check_weights(x, w_q, w_scale, bias, groups) -> None:
    channels = x.shape[1]
    require(
        w_q.dim() == 4 and w_q.dtype == torch.int8, OP,
        f"w_q must be int8 [O, C / groups, KH, KW], got {describe(w_q)}",
    )  # fmt: skip
    o, depth, kh, kw = w_q.shape
    require(
        groups >= 1 and channels % groups == 0 and o % groups == 0, OP,
        f"groups must divide the input channels {channels} and the output channels {o}, got {groups}",
    )  # fmt: skip
    require(
        channels >= 1 and depth == channels // groups, OP,
        f"w_q must be [O, {channels // groups}, KH, KW] for {channels} channels in {groups} groups, "
        f"got {describe(w_q)}",
    )  # fmt: skip
    require(
        1 <= kh <= 64 and 1 <= kw <= 64, OP, f"w_q must have kernel sizes from 1 to 64, got {describe(w_q)}"
    )
    require(
        depth * kh * kw <= 65536, OP,
        f"w_q must have at most 65536 weights per output channel (int32 sums), got {describe(w_q)}",
    )  # fmt: skip
    require(
        w_scale.dtype == torch.float32 and (w_scale.numel() == 1 or tuple(w_scale.shape) == (o,)), OP,
        f"w_scale must be float32 [O] = [{o}] or one number, got {describe(w_scale)}",
    )  # fmt: skip
    require(
        bias is None or (bias.dtype == torch.float32 and tuple(bias.shape) == (o,)), OP,
        f"bias must be float32 [O] = [{o}], got {describe(bias)}",
    )  # fmt: skip


def _check_result(
    shape, residual, residual_scale, residual_zero_point, out_scale, out_zero_point, out_dtype
) -> float:
    """1 / out_scale, or 1 for a floating result."""
    require(
        out_dtype in (*FLOATING, *BYTES), OP,
        f"out_dtype must be float32, float16, bfloat16, int8 or uint8, got {name(out_dtype)}",
    )  # fmt: skip
    inverse = 1.0
    if out_dtype in BYTES:
        require(out_scale != 0, OP, f"out_scale must be given for out_dtype {name(out_dtype)}")
        inverse = require_scale(OP, "out_scale", out_scale)
        require(
            is_code(out_zero_point, out_dtype), OP,
            f"out_zero_point must be a value of out_dtype {name(out_dtype)}, got {out_zero_point}",
        )  # fmt: skip
    else:
        require(
            out_scale == 0, OP, f"out_scale must be left out for out_dtype {name(out_dtype)}, got {out_scale}"
        )
    if residual is not None:
        require(
            tuple(residual.shape) == shape, OP,
            f"residual must have the shape of the output {list(shape)}, got {list(residual.shape)}",
        )  # fmt: skip
        require(
            residual.dtype in (*FLOATING, *BYTES), OP,
            f"residual must be int8, uint8, float32, float16 or bfloat16, got {name(residual.dtype)}",
        )  # fmt: skip
        _check_scale("residual_scale", residual_scale)
        require(
            residual.dtype in FLOATING or is_code(residual_zero_point, residual.dtype), OP,
            f"residual_zero_point must be a value of residual's dtype {name(residual.dtype)}, "
            f"got {residual_zero_point}",
        )  # fmt: skip
    return inverse


def conv2d_int8(
    x_q: Tensor, x_scale: float, x_zero_point: int, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
    activation: str = "none", residual: Tensor | None = None, residual_scale: float = 1.0,
    residual_zero_point: int = 0, post_activation: str = "none", out_scale: float = 0.0, out_zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The room's page has the formula, shapes and errors. Channels-last weights are read where they lie."""
    check_image(OP, "x_q", x_q, BYTES, "uint8 or int8")
    _check_weights(x_q, w_q, w_scale, bias, groups)
    window = window_of(OP, x_q.shape[2:], w_q.shape[2:], stride, padding, dilation, source="w_q", uneven=True)
    _check_scale("x_scale", x_scale)
    require(
        is_code(x_zero_point, x_q.dtype), OP,
        f"x_zero_point must be a value of x_q's dtype {name(x_q.dtype)}, got {x_zero_point}",
    )  # fmt: skip
    out_dtype = out_dtype or (torch.float32 if out_scale == 0 else torch.uint8)
    channels, o = x_q.shape[1], w_q.shape[0]
    shape = (x_q.shape[0], o, *window.out)
    require_activation(OP, "activation", activation)
    require_activation(OP, "post_activation", post_activation)
    inverse = _check_result(
        shape, residual, residual_scale, residual_zero_point, out_scale, out_zero_point, out_dtype
    )
    for argument, t in (("w_q", w_q), ("w_scale", w_scale), ("bias", bias), ("residual", residual)):
        if t is not None:
            require_device(OP, argument, t, x_q.device)
    out = empty_nhwc(x_q, shape, out_dtype)
    if out.numel() == 0:
        return out
    x, w = nhwc(x_q), filters_nhwc(w_q)
    residual = None if residual is None else nhwc(residual)
    bias, w_scale = None if bias is None else bias.contiguous(), w_scale.contiguous()
    residual_zero_point = residual_zero_point if residual is not None and residual.dtype in BYTES else 0
    scales = (x_scale, x_zero_point, residual_scale, residual_zero_point, inverse, out_zero_point)
    pixels, taps, depth = shape[0] * window.out[0] * window.out[1], math.prod(window.kernel), w_q.shape[1]
    geometry = (*window.stride, *window.padding, *window.dilation)
    epilogue = (w_scale.numel() > 1, activation, post_activation, index_type(x, out))
    if groups == channels == o:
        block_m, block_n = depthwise_tile(channels)
        launch(
            _depthwise_int8, (triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n),),
            x, w, w_scale, bias, residual, out, *scales, pixels, *window.out, *x.shape[2:], channels,
            window.kernel[1], taps, *geometry, *epilogue, window.padded, block_m, block_n, on=x,
        )  # fmt: skip
        return out
    columns, mode = o // groups, mode_of(depth, taps)
    gathered = mode == "gathered"
    w_sum = None
    if x_zero_point != (128 if x.dtype == torch.uint8 else 0):
        w_sum = prepared("sums of filters", w_q, lambda: _sums(w))

    def run(config):
        tiles = triton.cdiv(pixels, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
        launch(
            _conv2d_int8, (tiles * groups,),
            x, w, w_sum, w_scale, bias, residual, out, *scales, pixels, *window.out, *x.shape[2:], channels, o, depth,
            columns, window.kernel[1], taps, *geometry, *epilogue, mode, window.padded,
            not gathered and depth % config["BLOCK_K"] == 0, on=x, **config.options(),
        )  # fmt: skip

    size = x.element_size()
    configs = gemm_configs(
        pixels, columns, depth, size, size, out.element_size(), x, depth=GATHERED if gathered else 0,
        sizes=SMALL if gathered else LARGE,
    )  # fmt: skip
    tuned(_conv2d_int8, (x.dtype, mode, taps, groups, *shape_class(pixels, columns, depth)), configs, run, x)
    return out


def _sums(w: Tensor) -> Tensor:
    """int32 [O], of channels-last weights."""
    total = w.new_empty(w.shape[0], dtype=torch.int32)
    launch(_sum_weights, (w.shape[0],), w, total, w[0].numel(), 1024, on=w)
    return total


_SCALES = {
    "x_scale": "fp32", "x_zero_point": "i32", "residual_scale": "fp32", "residual_zero_point": "i32",
    "inverse_out_scale": "fp32", "out_zero_point": "i32",
}  # fmt: skip


def _ahead(kernel, x: str, config=None, **constants):
    options = {} if config is None else {"tensor_cores": True}
    tensors = {"x": f"*{x}", "w": "*i8", "w_scale": "*fp32", "bias": "*fp32", "residual": "*u8", "out": "*u8"}
    return ahead(
        kernel,
        tensors | _SCALES | dict.fromkeys(GEOMETRY, "i32")
        | {"PER_CHANNEL": True, "ACTIVATION": "none", "POST_ACTIVATION": "relu", "INDEX": tl.int32, "PADDED": True}
        | constants,
        config, **options,
    )  # fmt: skip


def _product_ahead(x: str, config, mode: str):
    gathered = mode == "gathered"
    sizes = dict.fromkeys(("channels", "out_channels", "depth", "columns"), "i32" if gathered else "i32:16")
    return _ahead(_conv2d_int8, x, config, w_sum="*i32", MODE=mode, EVEN=not gathered, **sizes)


AOT = [
    _product_ahead("u8", gemm_config(128, 128, 128, 8, 1, 1), "taps"),
    _product_ahead("u8", gemm_config(128, 128, 128, 8, 1, 1), "point"),
    _product_ahead("i8", gemm_config(64, 64, 128, 4, 1, 1), "taps"),
    _product_ahead("u8", gemm_config(64, 64, 32, 4, 1, 1), "gathered"),
    _ahead(_depthwise_int8, "u8", channels="i32:16", BLOCK_M=8, BLOCK_N=128),
    ahead(_sum_weights, {"w": "*i8", "total": "*i32", "K": "i32:16", "BLOCK": 1024}),
]
