"""linear_grouped for one or two rows of x: no tensor cores, the weights go from memory to registers once.

Codes, scales and sums are float32, so that every result is exact to float32 rounding; with activation_bits 8 the
codes of x are scaled before they are multiplied (sums of a block stay exact where scales are powers of two).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_tiles import shape_class
from ..common.triton_util import (
    Config,
    ahead,
    clamp,
    finish,
    inverse_of,
    is_finite,
    launch,
    next_power_of_2,
    round_half_even,
    scale_of,
    tuned,
)  # fmt: skip

MOST_ROWS = 2


@triton.jit
def codes_of(x, inverse):
    """Codes -127 .. 127 of float32 values; NaN becomes 0."""
    v = x * inverse
    return round_half_even(clamp(tl.where(v == v, v, 0.0), -127.0, 127.0)).to(tl.int8)


@triton.jit
def _few_rows(
    x, packed, scale, offset, bias, residual, out, M, N, K, ldx, ld_residual, group_size,
    ACTIVATION: tl.constexpr, POST_ACTIVATION: tl.constexpr, BITS: tl.constexpr, INTEGERS: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS rows x BLOCK_N columns of the result. PIECE divides a group and BLOCK_K."""
    PIECES: tl.constexpr = BLOCK_K // PIECE
    PER_BYTE: tl.constexpr = 8 // BITS
    CENTRE: tl.constexpr = 8 if BITS == 4 else 0
    m = tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_read = tl.minimum(n, N - 1).to(tl.int64)
    piece = tl.arange(0, PIECES) * PIECE
    w_at = packed + n_read[:, None] * (K // PER_BYTE) + tl.arange(0, BLOCK_K // PER_BYTE)[None, :]
    x_at = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * ldx + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((ROWS, BLOCK_N, PIECES, PIECE // PER_BYTE), tl.float32)
    for k in range(0, K, BLOCK_K):
        codes = tl.reshape(tl.load(w_at + k // PER_BYTE), [1, BLOCK_N, PIECES, PIECE // PER_BYTE])
        at = n_read[:, None] * (K // group_size) + ((k + piece) // group_size)[None, :]
        s = tl.load(scale + at).to(tl.float32)
        v = tl.reshape(tl.load(x_at + k).to(tl.float32), [ROWS, PIECES, PIECE])
        if INTEGERS:
            xs = scale_of(tl.max(tl.where(is_finite(v), tl.abs(v), 0.0), 2), 127.0)
            v = codes_of(v, inverse_of(xs)[:, :, None]).to(tl.float32) * xs[:, :, None]
        if BITS == 4:
            even, odd = tl.split(tl.reshape(v, [ROWS, PIECES, PIECE // 2, 2]))
            even, odd = even[:, None, :, :], odd[:, None, :, :]
            products = even * ((codes & 15).to(tl.float32) - 8.0) + odd * ((codes >> 4).to(tl.float32) - 8.0)
            sums = even + odd
        else:
            sums = v[:, None, :, :]
            products = sums * codes.to(tl.int8, bitcast=True).to(tl.float32)
        acc += products * s[None, :, :, None]
        if offset is not None:
            acc += sums * (tl.load(offset + at).to(tl.float32) + CENTRE * s)[None, :, :, None]
    finish(
        tl.sum(tl.sum(acc, 3), 2), m.to(tl.int64), n, m < M, n < N, bias, residual, out, ld_residual, N, 1.0, 0,
        ACTIVATION, POST_ACTIVATION,
    )  # fmt: skip


def _configs(k: int) -> list[Config]:
    """A tile is 4096 codes, 16 bytes or more of a row per thread."""
    deepest = k & -k
    depths = [min(deepest, depth) for depth in (512, 1024, 256)]
    return [
        Config.of(4, 2, BLOCK_N=min(64, max(2, 4096 // depth)), BLOCK_K=depth)
        for depth in dict.fromkeys(depths)
    ]


def multiply_few_rows(
    rows: Tensor, packed: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, bits: int, piece: int,
    bias: Tensor | None, residual: Tensor | None, out: Tensor, epilogue: tuple[int, str, str], integers: bool,
) -> None:  # fmt: skip
    """As the tiles do, for checked arguments: rows [M, K] with M up to MOST_ROWS."""
    (m, k), n = rows.shape, packed.shape[0]

    def run(config):
        launch(
            _few_rows, (triton.cdiv(n, config["BLOCK_N"]),),
            rows, packed, scale, offset, bias, residual, out, m, n, k, rows.stride(0), epilogue[0], group_size,
            *epilogue[1:], bits, integers, next_power_of_2(m), min(piece, config["BLOCK_K"]),
            on=rows, enable_fp_fusion=True, **config.options(),
        )  # fmt: skip

    tuned(_few_rows, (rows.dtype, bits, integers, piece, *shape_class(m, n, k)), _configs(k), run, rows)


def _ahead(bits: int, rows: int, piece: int, config: Config, integers: bool = False):
    pointers = dict.fromkeys(("x", "scale", "offset", "bias", "residual", "out"), "*fp16")
    return ahead(
        _few_rows,
        pointers
        | dict.fromkeys(("N", "K", "ldx", "ld_residual", "group_size"), "i32:16")
        | {
            "packed": "*u8", "M": "i32", "ACTIVATION": "none", "POST_ACTIVATION": "none", "BITS": bits,
            "INTEGERS": integers, "ROWS": rows, "PIECE": piece,
        },
        config, fp_fusion=True,
    )  # fmt: skip


AOT = [
    *(_ahead(4, 1, 32, config) for config in _configs(4096)),
    _ahead(4, 2, 128, _configs(4096)[0], integers=True),
    _ahead(8, 2, 32, _configs(4096)[0]),
]
