"""conv2d on GPUs: an implicit product over taps and channels of NHWC images, and a depthwise kernel.

The contract is conv2d.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import FLOATING, describe, name, require, require_activation, require_device
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
from ..common.triton_tiles import LARGE, SMALL, float32_precision, gemm_config, gemm_configs, shape_class
from ..common.triton_util import ahead, finish, launch, tile_of, tuned

OP = "conv2d"


@triton.jit
def _conv2d(
    x, w, bias, residual, out, pixels, out_height, out_width, height, width, channels, out_channels,
    depth, columns, kernel_w, taps, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    MODE: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output pixels x BLOCK_N output channels of one group, which has depth channels in and columns out."""
    tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m, image, top, left = pixel_tile(
        tile_m, pixels, out_height, out_width, stride_h, stride_w, padding_h, padding_w, INDEX, BLOCK_M
    )
    w_row = w + (group * columns + tl.minimum(n, columns - 1)).to(tl.int64)[:, None] * (taps * depth)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps_of(taps, depth, MODE, BLOCK_K)):
        x_at, w_at, inside, in_row = window_tile(
            step, image, top, left, channels, depth, height, width, kernel_w, taps, dilation_h, dilation_w,
            MODE, PADDED, EVEN, BLOCK_K,
        )  # fmt: skip
        a = tl.load(x + group * depth + x_at, mask=inside, other=0.0)
        b = tl.load(w_row + w_at[None, :], mask=in_row[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    finish(
        acc, m.to(tl.int64), group * columns + n, m < pixels, n < columns, bias, residual, out,
        out_channels, out_channels, 1.0, 0, ACTIVATION, POST_ACTIVATION,
    )  # fmt: skip


@triton.jit
def _depthwise(
    x, w, bias, residual, out, pixels, out_height, out_width, height, width, channels, kernel_w, taps,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, INDEX: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels x BLOCK_N channels, each channel by its own filter."""
    tiles_n = tl.cdiv(channels, BLOCK_N)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    m, image, top, left = pixel_tile(
        tile_m, pixels, out_height, out_width, stride_h, stride_w, padding_h, padding_w, INDEX, BLOCK_M
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(taps):
        pixel, inside = tap_of(
            image, top, left, tap // kernel_w, tap % kernel_w, height, width, dilation_h, dilation_w, PADDED
        )
        mask = inside[:, None] & (n < channels)[None, :]
        a = tl.load(x + pixel[:, None] * channels + n[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(w + n.to(tl.int64) * taps + tap, mask=n < channels, other=0.0).to(tl.float32)
        acc += a * b[None, :]
    finish(
        acc, m.to(tl.int64), n, m < pixels, n < channels, bias, residual, out, channels, channels, 1.0, 0,
        ACTIVATION, POST_ACTIVATION,
    )  # fmt: skip


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
    activation: str = "none", residual: Tensor | None = None, post_activation: str = "none",
) -> Tensor:  # fmt: skip
    """The room's page has the formula, shapes and errors. Channels-last weights are read where they lie."""
    check_image(OP, "x", x, FLOATING, "float32, float16 or bfloat16")
    channels = x.shape[1]
    require(groups >= 1 and channels % groups == 0, OP, f"groups must divide C = {channels}, got {groups}")
    depth = channels // groups
    require(
        weight.dtype == x.dtype and weight.dim() == 4 and weight.shape[1] == depth
        and weight.shape[2] >= 1 and weight.shape[3] >= 1 and weight.shape[0] % groups == 0, OP,
        f"weight must be {name(x.dtype)} [O, C / groups, height, width] with C / groups = {depth} "
        f"and O a multiple of groups, got {describe(weight)}",
    )  # fmt: skip
    window = window_of(
        OP, x.shape[2:], weight.shape[2:], stride, padding, dilation, source="weight", uneven=True
    )
    o = weight.shape[0]
    shape = (x.shape[0], o, *window.out)
    require(
        bias is None or (bias.dtype in FLOATING and tuple(bias.shape) == (o,)), OP,
        f"bias must be float32, float16 or bfloat16 [O] = [{o}], got {describe(bias)}",
    )  # fmt: skip
    require(
        residual is None or (residual.dtype in FLOATING and tuple(residual.shape) == shape), OP,
        f"residual must be float32, float16 or bfloat16 of the output's shape {list(shape)}, got {describe(residual)}",
    )  # fmt: skip
    require_activation(OP, "activation", activation)
    require_activation(OP, "post_activation", post_activation)
    for argument, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None:
            require_device(OP, argument, t, x.device)
    out = empty_nhwc(x, shape, x.dtype)
    if out.numel() == 0:
        return out
    x, weight = nhwc(x), filters_nhwc(weight)
    residual = None if residual is None else nhwc(residual)
    bias = None if bias is None else bias.contiguous()
    taps = window.kernel[0] * window.kernel[1]
    pixels = shape[0] * window.out[0] * window.out[1]
    geometry = (*window.stride, *window.padding, *window.dilation)
    index = index_type(x, out)
    if groups == channels == o:
        block_m, block_n = depthwise_tile(channels)
        launch(
            _depthwise, (triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n),),
            x, weight, bias, residual, out, pixels, *window.out, *x.shape[2:], channels, window.kernel[1], taps,
            *geometry, activation, post_activation, index, window.padded, block_m, block_n,
            on=x, enable_fp_fusion=True,
        )  # fmt: skip
        return out
    columns, mode = o // groups, mode_of(depth, taps)
    gathered = mode == "gathered"

    def run(config):
        tiles = triton.cdiv(pixels, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
        launch(
            _conv2d, (tiles * groups,),
            x, weight, bias, residual, out, pixels, *window.out, *x.shape[2:], channels, o, depth, columns,
            window.kernel[1], taps, *geometry, activation, post_activation, float32_precision(x.dtype), index,
            mode, window.padded, not gathered and depth % config["BLOCK_K"] == 0,
            on=x, enable_fp_fusion=True, **config.options(),
        )  # fmt: skip

    size = x.element_size()
    configs = gemm_configs(
        pixels, columns, depth, size, size, out.element_size(), x, depth=GATHERED if gathered else 0,
        sizes=SMALL if gathered else LARGE,
    )  # fmt: skip
    key = (x.dtype, mode, taps, groups, *shape_class(pixels, columns, depth))
    tuned(_conv2d, key, configs, run, x)
    return out


def _ahead(dtype: str, config, mode: str, even: bool = True):
    aligned = ("channels", "out_channels", "depth", "columns")
    return ahead(
        _conv2d,
        dict.fromkeys(("x", "w", "bias", "residual", "out"), f"*{dtype}")
        | dict.fromkeys(GEOMETRY, "i32")
        | dict.fromkeys(aligned, "i32:16" if even else "i32")
        | {
            "ACTIVATION": "relu", "POST_ACTIVATION": "none", "PRECISION": "ieee", "INDEX": tl.int32,
            "MODE": mode, "PADDED": mode != "point", "EVEN": even,
        },
        config, tensor_cores=dtype != "fp32", fp_fusion=True,
    )  # fmt: skip


AOT = [
    _ahead("fp16", gemm_config(128, 128, 64, 8, 2, 2), "taps"),
    _ahead("bf16", gemm_config(128, 128, 64, 8, 2, 2), "point"),
    _ahead("bf16", gemm_config(64, 64, 32, 4, 2, 2), "gathered", even=False),
    _ahead("fp32", gemm_config(64, 64, 32, 4, 4, 4), "taps"),
    ahead(
        _depthwise,
        dict.fromkeys(("x", "w", "bias", "residual", "out"), "*fp16")
        | dict.fromkeys(GEOMETRY, "i32")
        | {
            "channels": "i32:16", "ACTIVATION": "relu6", "POST_ACTIVATION": "none", "INDEX": tl.int32,
            "PADDED": True, "BLOCK_M": 8, "BLOCK_N": 128,
        },
        fp_fusion=True,
    ),
]  # fmt: skip
