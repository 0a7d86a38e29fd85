"""linear_grouped on GPUs: int4 or int8 weights read once from memory, decoded in registers, multiplied on tensor cores.

The contract is linear_grouped.h, the packed weights are those of dequantize.h. Three ways to multiply:

rounded   activation_bits 16, x and the result in the same 16-bit dtype: w = q * scale + offset is rounded to that
          dtype; the error stays within one rounding of the result.
exact     activation_bits 16 otherwise: codes are exact in x's dtype, their sums are scaled group by group in float32.
integers  activation_bits 8: x in int8 per block, exact int32 sums, scaled block by block in float32.

Where tiles are fewer than multiprocessors, K is split over the grid; a second kernel adds the parts in their order,
so that results repeat bit for bit. One or two rows: linear_grouped_few_triton.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import FLOATING, describe, name, require, require_device, rows_of
from ..common.triton_tiles import (
    LARGE,
    MEDIUM,
    SMALL,
    float32_precision,
    gemm_config,
    gemm_configs,
    shape_class,
)
from ..common.triton_util import (
    ahead,
    finish,
    inverse_of,
    is_finite,
    launch,
    multiprocessors,
    scale_of,
    tile_of,
    tuned,
)
from ..linear.linear_triton import check_epilogue
from .linear_grouped_few_triton import MOST_ROWS, codes_of, multiply_few_rows

OP = "linear_grouped"
#: Above this, quantising x once is cheaper than in every tile.
ROWS_QUANTISED_INSIDE = 64


@triton.jit
def _load_codes(at, BITS: tl.constexpr, CENTRE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """int8 [BLOCK_N, BLOCK_K]: the codes, less CENTRE; a byte of two holds the even k in its low nibble."""
    packed = tl.load(at)
    if BITS == 4:
        packed = tl.reshape(tl.join(packed & 15, packed >> 4), [BLOCK_N, BLOCK_K])
    return packed.to(tl.int8, bitcast=True) - CENTRE


@triton.jit
def _quantize_blocks(
    x, q, scale, total, M, K, ldx, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Per block of a row: codes, scale, and scale * the sum of the codes."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    blocks = K // BLOCK
    k = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    stored = (m < M)[:, None] & (block < blocks)[None, :]
    values = tl.load(x + m[:, None, None] * ldx + k[None, :, :], mask=stored[:, :, None], other=0.0).to(
        tl.float32
    )
    s = scale_of(tl.max(tl.where(is_finite(values), tl.abs(values), 0.0), 2), 127.0)
    codes = codes_of(values, inverse_of(s)[:, :, None])
    tl.store(q + m[:, None, None] * K + k[None, :, :], codes, mask=stored[:, :, None])
    at = m[:, None] * blocks + block[None, :]
    tl.store(scale + at, s, mask=stored)
    tl.store(total + at, tl.sum(codes.to(tl.int32), 2).to(tl.float32) * s, mask=stored)


@triton.jit
def _linear_grouped(
    x, x_scale, x_sum, packed, scale, offset, bias, residual, out, M, N, K, ldx, ld_residual, group_size, split_k,
    ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BITS: tl.constexpr, INTEGERS: tl.constexpr, ROUNDED: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of the result over split_k of K. PIECE divides a group; BLOCK_K is PIECE except when ROUNDED."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end are read as the last one and never stored: no masks in the loop.
    m_read = tl.minimum(m, M - 1)
    n_read = tl.minimum(n, N - 1).to(tl.int64)
    x_at = x + m_read[:, None] * ldx + tl.arange(0, BLOCK_K)[None, :]
    w_at = packed + n_read[:, None] * (K // 8 * BITS) + tl.arange(0, BLOCK_K * BITS // 8)[None, :]
    scale_at = n_read * (K // group_size)
    CENTRE: tl.constexpr = 8 if BITS == 4 else 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(1) * split_k
    for k in range(first, tl.minimum(first + split_k, K), BLOCK_K):
        a = tl.load(x_at + k)
        q = _load_codes(w_at + k // 8 * BITS, BITS, CENTRE, BLOCK_N, BLOCK_K)
        if ROUNDED:
            PIECES: tl.constexpr = BLOCK_K // PIECE
            at = scale_at[:, None] + ((k + tl.arange(0, PIECES) * PIECE) // group_size)[None, :]
            s = tl.load(scale + at).to(tl.float32)
            w = tl.reshape(q, [BLOCK_N, PIECES, PIECE]).to(tl.float32) * s[:, :, None]
            if offset is not None:
                w += (tl.load(offset + at).to(tl.float32) + CENTRE * s)[:, :, None]
            acc = tl.dot(a, tl.reshape(w, [BLOCK_N, BLOCK_K]).to(a.dtype).T, acc)
        else:
            at = scale_at + k // group_size
            s = tl.load(scale + at).to(tl.float32)
            if INTEGERS:
                if x_scale is None:
                    values = a.to(tl.float32)
                    xs = scale_of(tl.max(tl.where(is_finite(values), tl.abs(values), 0.0), 1), 127.0)
                    a = codes_of(values, inverse_of(xs)[:, None])
                else:
                    xs = tl.load(x_scale + m_read * (K // PIECE) + k // PIECE)
                part = tl.dot(a, q.T, out_dtype=tl.int32).to(tl.float32) * xs[:, None]
            else:
                part = tl.dot(a, q.to(a.dtype).T, input_precision=PRECISION)
            acc += part * s[None, :]
            if offset is not None:
                if not INTEGERS:
                    total = tl.sum(a.to(tl.float32), 1)
                elif x_scale is None:
                    total = tl.sum(a.to(tl.int32), 1).to(tl.float32) * xs
                else:
                    total = tl.load(x_sum + m_read * (K // PIECE) + k // PIECE)
                acc += total[:, None] * (tl.load(offset + at).to(tl.float32) + CENTRE * s)[None, :]
    finish(
        acc, m + tl.program_id(1).to(tl.int64) * M, n, m < M, n < N, bias, residual, out, ld_residual, N, 1.0, 0,
        ACTIVATION, POST_ACTIVATION,
    )  # fmt: skip


@triton.jit
def _add_parts(
    parts, bias, residual, out, M, N, ld_residual, PARTS,
    ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of float32 [PARTS, M, N] in their order, and the epilogue."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(PARTS):
        acc += tl.load(parts + (m + part * M)[:, None] * N + n[None, :], mask=inside, other=0.0)
    finish(acc, m, n, m < M, n < N, bias, residual, out, ld_residual, N, 1.0, 0, ACTIVATION, POST_ACTIVATION)


def _check(x, packed, scale, offset, group_size, bits, activation_bits) -> tuple[int, int]:
    require(bits in (4, 8), OP, f"bits must be 4 or 8, got {bits}")
    require(
        packed.dim() == 2 and packed.dtype in (torch.uint8, torch.int8), OP,
        f"packed must be uint8 or int8 [N, K * bits / 8], got {describe(packed)}",
    )  # fmt: skip
    n, k = packed.shape[0], packed.shape[1] * 8 // bits
    require(
        group_size > 0 and group_size % 32 == 0 and k % group_size == 0, OP,
        f"group_size must be a multiple of 32 that divides K = {k}, got {group_size}",
    )  # fmt: skip
    require(
        scale.dtype in (torch.float32, torch.float16), OP,
        f"scale must be float32 or float16, got {name(scale.dtype)}",
    )  # fmt: skip
    shape = (n, k // group_size)
    require(
        tuple(scale.shape) == shape, OP,
        f"scale must be [N, K / group_size] = {list(shape)}, got {list(scale.shape)}",
    )  # fmt: skip
    require(
        offset is None or (offset.dtype == scale.dtype and offset.shape == scale.shape), OP,
        f"offset must have the shape and dtype of scale, {describe(scale)}, got {describe(offset)}",
    )  # fmt: skip
    require(
        x.dtype in FLOATING and x.dim() >= 1 and x.shape[-1] == k, OP,
        f"x must be float32, float16 or bfloat16 [..., K] with K = {k}, got {describe(x)}",
    )  # fmt: skip
    require(activation_bits in (8, 16), OP, f"activation_bits must be 8 or 16, got {activation_bits}")
    for argument, t in (("packed", packed), ("scale", scale), ("offset", offset)):
        if t is not None:
            require_device(OP, argument, t, x.device)
    return n, k


def linear_grouped(
    x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, bits: int,
    bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None, *, activation_bits: int = 16, post_activation: str = "none",
) -> Tensor:  # fmt: skip
    """``post_activation(activation(x W^T + bias) + residual)``: the room's page has shapes and errors."""
    n, k = _check(x, packed, scale, offset, group_size, bits, activation_bits)
    out_dtype = out_dtype or x.dtype
    check_epilogue(OP, x, n, bias, activation, residual, out_dtype, post_activation)
    out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    rows = rows_of(x)
    packed, scale = packed.contiguous().view(torch.uint8), scale.contiguous()
    offset = None if offset is None else offset.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows_of(residual)
    epilogue = (0 if residual is None else residual.stride(0), activation, post_activation)
    m, integers = rows.shape[0], activation_bits == 8
    rounded = not integers and x.dtype == out_dtype != torch.float32
    piece = math.gcd(group_size, 128)
    if m <= MOST_ROWS:
        multiply_few_rows(
            rows, packed, scale, offset, group_size, bits, piece, bias, residual, out, epilogue, integers
        )
        return out
    x_scale = x_sum = None
    if integers and m > ROWS_QUANTISED_INSIDE:
        rows, x_scale, x_sum = _quantised(rows, piece)

    configs = gemm_configs(
        m, n, k & -k if rounded else piece, rows.element_size(), bits / 8, out.element_size(), x,
        depth=piece if integers else 0, sizes=LARGE if rounded else MEDIUM if integers else SMALL if x.dtype == torch.float32 else MEDIUM,
    )  # fmt: skip

    def run(config):
        block_k = config["BLOCK_K"]
        tiles = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
        parts, split_k = _split(tiles, k, block_k, multiprocessors(x))
        whole = parts == 1
        target = (
            (bias, residual, out) if whole else (None, None, x.new_empty((parts, m, n), dtype=torch.float32))
        )
        launch(
            _linear_grouped, (tiles, parts),
            rows, x_scale, x_sum, packed, scale, offset, *target, m, n, k, rows.stride(0), epilogue[0], group_size,
            split_k, *(epilogue[1:] if whole else ("none", "none")), float32_precision(x.dtype),
            bits, integers, rounded, min(piece, block_k), on=x, enable_fp_fusion=True, **config.options(),
        )  # fmt: skip
        if not whole:
            launch(
                _add_parts, (triton.cdiv(m, 16), triton.cdiv(n, 64)),
                target[2], bias, residual, out, m, n, epilogue[0], parts, *epilogue[1:], 16, 64, on=x,
            )  # fmt: skip

    key = (x.dtype, out_dtype, bits, activation_bits, piece, *shape_class(m, n, k))
    tuned(_linear_grouped, key, configs, run, x)
    return out


def _quantised(rows: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [M, K], scales and scaled sums of codes [M, K / block]."""
    m, k = rows.shape
    q = rows.new_empty((m, k), dtype=torch.int8)
    scale, total = (rows.new_empty((m, k // block), dtype=torch.float32) for _ in range(2))
    grid = (triton.cdiv(m, 4), triton.cdiv(k, 1024))
    launch(
        _quantize_blocks, grid, rows, q, scale, total, m, k, rows.stride(0), block, 4, 1024 // block, on=rows
    )  # fmt: skip
    return q, scale, total


def _split(tiles: int, k: int, block_k: int, processors: int) -> tuple[int, int]:
    """Parts of K, and the length of each: enough of them to fill the GPU, with at least four steps each."""
    steps = triton.cdiv(k, block_k)
    parts = max(1, min(processors // tiles, steps // 4, 16))
    length = triton.cdiv(steps, parts)
    return triton.cdiv(steps, length), length * block_k


def _ahead(x: str, bits: int, config, *, out: str = "fp16", integers: bool = False, piece: int = 32):
    integers = integers or x == "i8"
    rounded = not integers and x == out
    return ahead(
        _linear_grouped,
        {
            "x": f"*{x}", "x_scale": "*fp32" if x == "i8" else None, "x_sum": "*fp32" if x == "i8" else None,
            "packed": "*u8", "scale": "*fp16", "offset": "*fp16", "bias": "*fp16", "residual": "*fp16",
            "out": f"*{out}", "M": "i32", "N": "i32:16", "K": "i32:16", "ldx": "i32:16", "ld_residual": "i32:16",
            "group_size": "i32:16", "split_k": "i32:16", "ACTIVATION": "none", "POST_ACTIVATION": "none",
            "PRECISION": "ieee", "BITS": bits, "INTEGERS": integers, "ROUNDED": rounded,
            "PIECE": min(piece, config["BLOCK_K"]),
        },
        config, tensor_cores=True, fp_fusion=True,
    )  # fmt: skip


AOT = [
    _ahead("fp16", 4, gemm_config(16, 64, 128, 4, 2, 0.5)),
    _ahead("fp16", 4, gemm_config(128, 128, 64, 8, 2, 0.5)),
    _ahead("bf16", 8, gemm_config(128, 128, 64, 8, 2, 1), out="bf16"),
    _ahead("fp16", 4, gemm_config(16, 64, 128, 4, 2, 0.5), out="fp32", piece=128),
    _ahead("fp16", 4, gemm_config(64, 64, 128, 8, 2, 0.5), integers=True, piece=128),
    _ahead("i8", 4, gemm_config(128, 64, 32, 8, 1, 0.5)),
    _ahead("i8", 8, gemm_config(128, 64, 128, 8, 1, 1), piece=128),
]
