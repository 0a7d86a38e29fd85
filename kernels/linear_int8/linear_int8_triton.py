"""linear_int8 and its forms in Triton: persistent blocks over L2-swizzled tiles (formulas: linear_int8.h).

One kernel: a tile of x [BLOCK_M, K] times a tile of w [BLOCK_N, K], int8 on the tensor cores into int32, scales and
epilogue on the tile in registers, one store. Sums are exact: K beyond 65536, and groups, leave the integers once per
piece. Few rows are bound by the bytes of w, which each block reads in narrow strips to fill the GPU; many rows by
arithmetic. With per-token scales and none, relu or relu6 the bits are those of every other backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common.prepared import prepared
from ..common.triton_util import Config, ahead, finish, launch, multiprocessors, tile_of, tuned
from ..quantize.quantize_triton import quantize_rows

#: Columns whose products always fit an int32.
_EXACT = 65536


@triton.jit
def _product(acc, x, w, first, last, depth, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + x w^T over steps first .. last of BLOCK_K columns; x and w point to the columns of step 0."""
    k = tl.arange(0, BLOCK_K)
    for step in range(first, last):
        if EVEN:
            a = tl.load(x + step * BLOCK_K)
            b = tl.load(w + step * BLOCK_K)
        else:
            left = depth - step * BLOCK_K
            a = tl.load(x + step * BLOCK_K, mask=k[None, :] < left, other=0)
            b = tl.load(w + step * BLOCK_K, mask=k[:, None] < left, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _linear_int8(
    x, x_scale, x_zero_point, w, w_sum, w_scale, bias, residual, out,
    rows, columns, depth, ld_x, ld_w, x_scale_stride, w_scale_stride, ld_residual,
    inverse_out_scale, out_zero_point,
    ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, PIECE: tl.constexpr,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """PIECE: columns that are summed in int32; 0: all of them. GROUPED: a piece is a group with its own scale of x."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    steps = tl.cdiv(depth, BLOCK_K)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        # Rows past the end are read from the beginning: no mask in the loop, nothing stored.
        row, column = m % rows, n % columns
        k = tl.arange(0, BLOCK_K)
        at_x = x + row[:, None] * ld_x + k[None, :]
        at_w = w + column[None, :] * ld_w + k[:, None]
        if PIECE == 0:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            acc = _product(acc, at_x, at_w, 0, steps, depth, EVEN, BLOCK_K)
            if x_zero_point is not None:
                acc -= tl.load(x_zero_point + row)[:, None] * tl.load(w_sum + column)[None, :]
            v = acc.to(tl.float32)
        else:
            v = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for piece in range(0, tl.cdiv(depth, PIECE)):
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
                first = piece * (PIECE // BLOCK_K)
                last = tl.minimum(first + PIECE // BLOCK_K, steps)
                acc = _product(acc, at_x, at_w, first, last, depth, EVEN, BLOCK_K)
                part = acc.to(tl.float32)
                if GROUPED:
                    part *= tl.load(x_scale + row * x_scale_stride + piece)[:, None]
                v += part
            if x_zero_point is not None:
                zero = tl.load(x_zero_point + row).to(tl.float32)
                v -= zero[:, None] * tl.load(w_sum + column).to(tl.float32)[None, :]
        if not GROUPED:
            v *= tl.load(x_scale + row * x_scale_stride)[:, None]
        v *= tl.load(w_scale + column * w_scale_stride)[None, :]
        finish(
            v, m, n, m < rows, n < columns, bias, residual, out, ld_residual, columns,
            inverse_out_scale, out_zero_point, ACTIVATION, POST_ACTIVATION,
        )  # fmt: skip


@triton.jit
def _row_sums(w, w_sum, depth, ld_w, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, depth, BLOCK):
        total += tl.load(w + row * ld_w + start + k, mask=start + k < depth, other=0).to(tl.int32)
    tl.store(w_sum + row, tl.sum(total, 0))


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8)


#: Rows at most -> candidates. The first of each stays below the 99 KiB of shared memory of sm_86, 89 and 120.
CONFIGS = {
    16: [_tile(16, 32, 256, 4, 4), _tile(16, 64, 256, 4, 4), _tile(16, 16, 512, 4, 4), _tile(16, 128, 128, 4, 4)],
    64: [_tile(64, 64, 128, 4, 4), _tile(64, 128, 128, 4, 4), _tile(32, 64, 256, 4, 3), _tile(64, 32, 256, 4, 3)],
    1 << 62: [
        _tile(128, 128, 128, 8, 3),
        _tile(128, 256, 128, 8, 3),
        _tile(256, 128, 128, 8, 3),
        _tile(128, 128, 64, 4, 4),
        _tile(64, 128, 128, 4, 4),
    ],
}  # fmt: skip


def _configs(rows: int, group: int) -> list[Config]:
    """With groups, a step must lie within one: the largest power of two that divides it."""
    candidates = next(configs for most, configs in CONFIGS.items() if rows <= most)
    if not group:
        return candidates
    step = group & -group
    fitted = [
        _tile(c["BLOCK_M"], c["BLOCK_N"], min(step, c["BLOCK_K"]), c.num_warps, c.num_stages)
        for c in candidates
    ]
    return list(dict.fromkeys(fitted))


def _check_weights(op: str, x: Tensor, w_q: Tensor, w_scale: Tensor, group_size: int) -> None:
    checks.require(x.dim() >= 1, op, f"x must be [..., K], got {list(x.shape)}")
    checks.require(
        w_q.dtype == torch.int8 and w_q.dim() == 2, op, f"w_q must be int8 [N, K], got {checks.describe(w_q)}"
    )
    depth, columns = x.shape[-1], w_q.shape[0]
    checks.require(w_q.shape[1] == depth, op, f"w_q must be [N, K] with K = {depth}, got {list(w_q.shape)}")
    checks.require(
        group_size == 0 or (group_size > 0 and group_size % 32 == 0 and depth % group_size == 0),
        op,
        f"group_size must be 0 or a multiple of 32 that divides K = {depth}, got {group_size}",
    )
    checks.require(
        w_scale.dtype == torch.float32 and (w_scale.numel() == 1 or tuple(w_scale.shape) == (columns,)),
        op,
        f"w_scale must be float32 [N] = [{columns}] or one number, got {checks.describe(w_scale)}",
    )
    for argument, t in (("w_q", w_q), ("w_scale", w_scale)):
        checks.require_device(op, argument, t, x.device)


def _check_activations(op: str, x: Tensor, x_scale: Tensor, zero: Tensor | None, group_size: int) -> None:
    checks.require(x.dtype == torch.int8, op, f"x_q must be int8, got {checks.name(x.dtype)}")
    checks.require(
        x_scale.dtype == torch.float32, op, f"x_scale must be float32, got {checks.name(x_scale.dtype)}"
    )
    tokens, shape = list(x.shape[:-1]), list(x_scale.shape)
    if group_size:
        per_group = [*tokens, x.shape[-1] // group_size]
        text = f"x_scale must be [..., K / group_size] = {per_group}, got {shape}"
        checks.require(shape == per_group, op, text)
    else:
        fits = shape in (tokens, [*tokens, 1]) or x_scale.numel() == 1
        checks.require(fits, op, f"x_scale must be {tokens} (per token) or one number, got {shape}")
    checks.require_device(op, "x_scale", x_scale, x.device)
    if zero is not None:
        checks.require(group_size == 0, op, "x_zero_point must be absent when group_size is set")
        checks.require(
            zero.dtype == torch.int32 and zero.numel() == x.shape[:-1].numel(),
            op,
            f"x_zero_point must be int32 with one value per token, got {checks.describe(zero)}",
        )
        checks.require_device(op, "x_zero_point", zero, x.device)


def _run(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str,
    residual: Tensor | None, out_dtype: torch.dtype, zero: Tensor | None, group_size: int,
    post_activation: str, inverse_out_scale: float = 1.0, out_zero_point: int = 0,
) -> Tensor:  # fmt: skip
    """Arguments are checked."""
    depth, columns = x_q.shape[-1], w_q.shape[0]
    out = x_q.new_empty((*x_q.shape[:-1], columns), dtype=out_dtype)
    if out.numel() == 0:
        return out
    x, w = checks.rows_of(x_q), checks.rows_of(w_q)
    rows, group = x.shape[0], group_size if depth else 0
    x_scale = x_scale.contiguous() if x_scale.numel() else x_scale.new_ones(1)
    if group:
        x_scale_stride = depth // group
    else:
        x_scale_stride = 0 if x_scale.numel() == 1 else 1
    w_sum = None
    if zero is not None:
        zero, w_sum = zero.contiguous(), prepared("sums of rows", w_q, lambda: _sums(w))
    residual = checks.rows_of(residual) if residual is not None else None
    piece = group or (_EXACT if depth > _EXACT else 0)

    def run(config: Config) -> None:
        tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
        at_once = multiprocessors(x) * (1 if config["BLOCK_M"] * config["BLOCK_N"] > 16384 else 2)
        launch(
            _linear_int8, (tiles if rows <= 16 else min(tiles, at_once),),
            x, x_scale, zero, w, w_sum, w_scale.contiguous(),
            bias.contiguous() if bias is not None else None, residual, out, rows, columns, depth,
            x.stride(0), w.stride(0), x_scale_stride, 0 if w_scale.numel() == 1 else 1,
            residual.stride(0) if residual is not None else 0, inverse_out_scale, out_zero_point,
            on=x, ACTIVATION=activation, POST_ACTIVATION=post_activation, PIECE=piece,
            GROUPED=group > 0, EVEN=depth % config["BLOCK_K"] == 0, **config.options(),
        )  # fmt: skip

    key = (_size(rows), columns, depth, group)
    tuned(_linear_int8, key, _configs(rows, group), run, x)
    return out


def _sums(w: Tensor) -> Tensor:
    """int32 [N], of the rows of w [N, K]."""
    total = w.new_empty(w.shape[0], dtype=torch.int32)
    launch(_row_sums, (w.shape[0],), w, total, w.shape[1], w.stride(0), on=w, BLOCK=1024)
    return total


def _size(rows: int) -> int:
    """Few rows as they are, many by powers of two: the classes that are tuned apart."""
    return 16 if rows <= 16 else 1 << (rows - 1).bit_length()


def linear_int8(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    activation: str = "none", residual: Tensor | None = None, out_dtype: torch.dtype | None = None,
    x_zero_point: Tensor | None = None, *, group_size: int = 0, post_activation: str = "none",
) -> Tensor:  # fmt: skip
    op, out_dtype = "linear_int8", out_dtype or torch.float32
    _check_weights(op, x_q, w_q, w_scale, group_size)
    checks.require_epilogue(op, x_q, w_q.shape[0], bias, activation, residual, post_activation)
    _check_activations(op, x_q, x_scale, x_zero_point, group_size)
    checks.require_out_floating(op, out_dtype)
    return _run(
        x_q, x_scale, w_q, w_scale, bias, activation, residual, out_dtype, x_zero_point, group_size,
        post_activation,
    )  # fmt: skip


def linear_int8_requantize(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str,
    residual: Tensor | None, out_scale: float, out_zero_point: int = 0,
    out_dtype: torch.dtype = torch.int8, x_zero_point: Tensor | None = None, *, group_size: int = 0,
    post_activation: str = "none",
) -> Tensor:  # fmt: skip
    op = "linear_int8_requantize"
    _check_weights(op, x_q, w_q, w_scale, group_size)
    checks.require_epilogue(op, x_q, w_q.shape[0], bias, activation, residual, post_activation)
    _check_activations(op, x_q, x_scale, x_zero_point, group_size)
    inverse = checks.require_requantise(op, out_scale, out_zero_point, out_dtype)
    return _run(
        x_q, x_scale, w_q, w_scale, bias, activation, residual, out_dtype, x_zero_point, group_size,
        post_activation, inverse, out_zero_point,
    )  # fmt: skip


def linear_dynamic_int8(
    x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None, activation: str = "none",
    residual: Tensor | None = None, out_dtype: torch.dtype | None = None, *, group_size: int = 0,
    asymmetric: bool = False, post_activation: str = "none", strict: bool = False,
) -> Tensor:  # fmt: skip
    op, out_dtype = "linear_dynamic_int8", out_dtype or x.dtype
    checks.require_floating(op, "x", x)
    checks.require(not (asymmetric and group_size), op, "asymmetric must be False when group_size is set")
    _check_weights(op, x, w_q, w_scale, group_size)
    checks.require_epilogue(op, x, w_q.shape[0], bias, activation, residual, post_activation)
    checks.require_out_floating(op, out_dtype)
    x_q, x_scale, zero = quantize_rows(op, x, group_size, asymmetric, strict)
    return _run(
        x_q, x_scale, w_q, w_scale, bias, activation, residual, out_dtype, zero, group_size, post_activation
    )


def _ahead(config: Config, out: str, group: int = 0, asymmetric: bool = False, wide: bool = True, **more):
    arguments = {
        "x": "*i8", "x_scale": "*fp32", "x_zero_point": "*i32" if asymmetric else None, "w": "*i8",
        "w_sum": "*i32" if asymmetric else None, "w_scale": "*fp32", "bias": "*fp16", "residual": "*fp16",
        "out": out, "rows": "i32", "columns": "i32:16", "depth": "i32:16", "ld_x": "i32:16",
        "ld_w": "i32:16", "x_scale_stride": "i32", "w_scale_stride": "i32", "ld_residual": "i32:16",
        "inverse_out_scale": "fp32", "out_zero_point": "i32", "ACTIVATION": "gelu",
        "POST_ACTIVATION": "none", "PIECE": group, "GROUPED": group > 0, "EVEN": True, **more,
    }  # fmt: skip
    return ahead(_linear_int8, arguments, config, tensor_cores=True, wide_loads=wide)


AOT = [
    *(_ahead(configs[0], "*fp16") for configs in CONFIGS.values()),
    _ahead(_configs(1024, 0)[0], "*i8", ACTIVATION="relu", residual=None),
    _ahead(_configs(1024, 0)[0], "*bf16", asymmetric=True, bias="*bf16", residual="*bf16"),
    _ahead(_configs(1024, 64)[0], "*fp16", 64),
    _ahead(_configs(1, 32)[0], "*fp16", 32, wide=False),  # 32 columns of 32 rows: 8 bytes a thread
    ahead(
        _row_sums,
        {"w": "*i8", "w_sum": "*i32", "depth": "i32:16", "ld_w": "i32:16", "BLOCK": 1024},
        num_warps=4,
    ),
]
