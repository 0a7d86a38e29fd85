"""The all-integer form of attention_int8 in Triton: 8-bit weights times 8-bit values, summed in int32.

    v8_j  = round(v_j / vs_j),  vs_j the largest magnitude of row j over 127
    y_ij  = s_ij + log(r_j),    r_j = vs_j / top, top the largest vs of the sequence and head
    p8_ij = round(255 exp(y_ij - max of y_i in the tile)), from 0 to 255
    out_i = top * sum over tiles of (exp(max - m) / 255) * (p8 v8)  /  sum of exp(y_ij - m) / r_j

The scale of a key's values rides on its logit, so that a row of small values beside large ones (what an attention sink
looks like) keeps its own codes, and costs the others nothing; weights are rounded against the largest of a tile, the
denominator is made from weights that are not rounded. No vs is less than top * 2^-40, which keeps r in float32.

Triton multiplies int8 by int8 only: p8 - 128 takes the place of p8, and 128 times the sums of v8 over 32 keys, made
beside the codes, give the difference back. 255 * 127 * 128 < 2^22: the sums over a tile of up to 128 keys become float32
by an addition, exactly. Codes lie [head, column, key]: tensor cores want the keys of 8-bit values side by side.

Error beside the other form: at most sum_j p_ij vs_j / 2 for the values and, for the weights,
max_j (p_ij vs_j) / 510 * sum_j |v8_j|, p the softmax and j the keys that the row sees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.attention_checks import Attention
from ..attention.attention_triton import NOTHING, place, widths
from ..common.triton_util import ahead, codes, inverse_of, is_finite, launch

#: Pieces of a sequence whose largest value is sought apart; keys of a program of the quantiser; keys of a sum.
PARTS, KEYS, SUMMED = tl.constexpr(16), tl.constexpr(64), tl.constexpr(32)
#: The least scale of a row, of the largest: 2^-40.
LEAST = tl.constexpr(9.094947017729282e-13)


@triton.jit(do_not_specialize=["kv_heads", "sk"])
def top_kernel(
    v, cu_k, tops, v_batch, v_head, v_row, kv_heads, sk,
    DV: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """tops float32 [B, Hkv, PARTS]: the largest finite magnitude of a piece of the values."""
    pid = tl.program_id(0)
    part, rest = pid % PARTS, pid // PARTS
    b, kv_head = rest // kv_heads, rest % kv_heads
    first, length = sk * 0, sk
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_k + b), 0), sk)
        length = tl.minimum(tl.maximum(tl.load(cu_k + b + 1), first), sk) - first
    size = tl.cdiv(tl.cdiv(length, PARTS), KEYS) * KEYS
    v += b.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head + first.to(tl.int64) * v_row
    d = tl.arange(0, WIDTH)
    top = tl.zeros([WIDTH], tl.float32)
    for start in range(part * size, tl.minimum(part * size + size, length), KEYS):
        row = start + tl.arange(0, KEYS)
        inside = (row < length)[:, None] & (d < DV)[None, :]
        x = tl.load(v + row.to(tl.int64)[:, None] * v_row + d[None, :], mask=inside, other=0.0)
        x = tl.abs(x.to(tl.float32))
        top = tl.maximum(top, tl.max(tl.where(is_finite(x), x, 0.0), 0))
    tl.store(tops + pid, tl.max(top, 0))


@triton.jit(do_not_specialize=["batch", "kv_heads", "sq", "sk", "slots"])
def value_kernel(
    v, cu_k, cu_q, tops, v_codes, v_logs, v_inverses, v_sums, v_scale, v_batch, v_head, v_row,
    batch, kv_heads, sq, sk, slots,
    DV: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of blocks of KEYS keys, the last of a sequence filled up by zeros: v_codes int8 [Hkv, STORED, slots * KEYS],
    v_logs (log2 r, NaN for a row that is not finite) and v_inverses (1 / r) float32 [Hkv, slots * KEYS],
    v_sums int32 [Hkv, slots * KEYS / SUMMED, STORED]; v_scale float32 [B, Hkv]: the largest scale.
    """
    b, kv_head, row0, k0, q0, keys, queries = place(
        cu_k, cu_q, batch, kv_heads, sk, sq, 1, KEYS, PACKED, False
    )
    if row0 >= keys:
        return
    b64, kv64 = b.to(tl.int64), kv_head.to(tl.int64)
    part = tl.arange(0, PARTS)
    largest = tl.max(tl.load(tops + (b64 * kv_heads + kv64) * PARTS + part), 0) + tl.zeros([KEYS], tl.float32)
    largest = tl.maximum(tl.div_rn(largest, 127.0 + tl.zeros_like(largest)), 1.1754943508222875e-38)
    if row0 == 0:
        tl.store(v_scale + b64 * kv_heads + kv64, tl.max(largest, 0))
    d, lane = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    inside = (row0 + lane < keys)[:, None] & (d < DV)[None, :]
    row = (k0 + row0 + lane).to(tl.int64)
    x = tl.load(v + b64 * v_batch + kv64 * v_head + row[:, None] * v_row + d[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    finite = tl.min(is_finite(x).to(tl.int32), 1) > 0
    scale = tl.max(tl.where(is_finite(x), tl.abs(x), 0.0), 1)
    scale = tl.maximum(tl.div_rn(scale, 127.0 + tl.zeros_like(scale)), largest * LEAST)
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    code = tl.where(finite[:, None], codes(x * inverse_of(scale)[:, None], 0, -127, 127), 0)
    share = tl.where(finite, tl.div_rn(scale, largest), 1.0)

    slot = first_slot(b, k0, sk, PACKED) + row0 // KEYS
    key = (kv64 * slots + slot) * KEYS + lane
    tl.store(v_logs + key, tl.where(finite, tl.log2(share), float("nan")))
    tl.store(v_inverses + key, inverse_of(share))
    at = (kv64 * STORED + d[None, :].to(tl.int64)) * (slots.to(tl.int64) * KEYS)
    at += slot.to(tl.int64) * KEYS + lane[:, None]
    stored = (d < STORED)[None, :] & (lane >= 0)[:, None]
    tl.store(v_codes + at, code.to(tl.int8), mask=stored)
    pieces = tl.sum(tl.reshape(code, (KEYS // SUMMED, SUMMED, WIDTH)), 1)
    piece = (kv64 * slots + slot) * (KEYS // SUMMED) + tl.arange(0, KEYS // SUMMED)
    stored = (d < STORED)[None, :] & (piece >= 0)[:, None]
    tl.store(v_sums + piece[:, None] * STORED + d[None, :], pieces, mask=stored)


@triton.jit
def first_slot(b, k0, sk, PACKED: tl.constexpr):
    """Where the blocks of KEYS keys of sequence b begin: as place() deals them out."""
    if PACKED:
        return k0 // KEYS + b
    return b * tl.cdiv(sk, KEYS)


@triton.jit
def integer_step(
    sums, sums_tail, m, total, y, v, v_sums, inverse, start, v_row,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The next tile: weights to codes, their products with the codes of the values, maximum, denominator."""
    here = tl.max(y, 1)
    top = tl.maximum(m, here)
    base = tl.where(top == NOTHING, 0.0, top)
    p = tl.exp2(y - tl.where(here == NOTHING, 0.0, here)[:, None])
    older, share = tl.exp2(m - base), tl.exp2(here - base)
    total = total * older + share * tl.sum(p * inverse[None, :], 1)
    # 255 p rounds to an integer in the low bits of the sum, which is 128 less.
    p8 = (p * 255.0 + 12582784.0).to(tl.int32, bitcast=True).to(tl.int8)
    share = share * 0.00392156862745098
    STORED: tl.constexpr = V_MAIN + V_TAIL
    sums = sums * older[:, None] + share[:, None] * _products(
        p8, v, v_sums, start, v_row, 0, V_MAIN, STORED, BLOCK_M, BLOCK_N
    )
    if V_TAIL > 0:
        sums_tail = sums_tail * older[:, None] + share[:, None] * _products(
            p8, v, v_sums, start, v_row, V_MAIN, V_TAIL, STORED, BLOCK_M, BLOCK_N
        )
    return sums, sums_tail, top, total


@triton.jit
def _products(
    p8, v, v_sums, start, v_row, FROM: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(p8 + 128) v8 of a tile, columns FROM .. FROM + WIDTH, in float32. No mask: behind a sequence lie zeros."""
    d, lane = FROM + tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    added = tl.zeros([WIDTH], tl.int32)
    for i in tl.static_range(BLOCK_N // SUMMED):
        added += tl.load(v_sums + (start // SUMMED + i).to(tl.int64) * STORED + d)
    added = added * 128 + 0x4B400000
    part = tl.load(v + start + d.to(tl.int64)[None, :] * v_row + lane[:, None])
    product = tl.dot(p8, part, tl.zeros([BLOCK_M, WIDTH], tl.int32) + added[None, :], out_dtype=tl.int32)
    return product.to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def shares_of(sums, total, v_scale):
    """Sums over their denominator, times the scale that v_logs left out; 0 where a row saw nothing."""
    return sums * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None] * v_scale


def quantize_values(a: Attention) -> tuple[Tensor, ...]:
    """v_codes, v_logs, v_inverses, v_sums, v_scale of value_kernel."""
    packed, stored = a.cu_q is not None, sum(widths(a.v_depth))
    slots = a.sk // KEYS.value + a.batch if packed else a.batch * triton.cdiv(a.sk, KEYS.value)
    keys = slots * KEYS.value
    results = (
        a.v.new_empty((a.kv_heads, stored, keys), dtype=torch.int8),
        a.v.new_empty((a.kv_heads, keys), dtype=torch.float32),
        a.v.new_empty((a.kv_heads, keys), dtype=torch.float32),
        a.v.new_empty((a.kv_heads, keys // SUMMED.value, stored), dtype=torch.int32),
        a.v.new_ones((a.batch, a.kv_heads), dtype=torch.float32),
    )
    if a.kv_heads == 0 or a.sk == 0:
        return results
    tops = a.v.new_empty((a.batch, a.kv_heads, PARTS.value), dtype=torch.float32)
    width = triton.next_power_of_2(stored)
    warps = 16 if width > 128 else 4
    launch(
        top_kernel, (a.batch * a.kv_heads * PARTS.value,), a.v, a.cu_k, tops, *a.strides(a.v), a.kv_heads,
        a.sk, on=a.v, DV=a.v_depth, WIDTH=width, PACKED=packed, num_warps=warps,
    )  # fmt: skip
    launch(
        value_kernel, (slots * a.kv_heads,), a.v, a.cu_k, a.cu_q, tops, *results, *a.strides(a.v),
        a.batch, a.kv_heads, a.sq, a.sk, slots,
        on=a.v, DV=a.v_depth, WIDTH=width, STORED=stored, PACKED=packed, num_warps=warps,
    )  # fmt: skip
    return results


def _ahead(dtype: str, depth: int, packed: bool):
    stored = sum(widths(depth))
    width = triton.next_power_of_2(stored)
    shared = {"v": f"*{dtype}", "cu_k": "*i32" if packed else None, "tops": "*fp32", "PACKED": packed}
    shared |= dict.fromkeys(("v_batch", "v_head", "v_row"), "i32:16")
    shared |= {"kv_heads": "i32", "sk": "i32", "DV": depth, "WIDTH": width}
    rest = {"cu_q": "*i32" if packed else None, "v_codes": "*i8", "v_sums": "*i32"}
    rest |= dict.fromkeys(("v_logs", "v_inverses", "v_scale"), "*fp32")
    rest |= dict.fromkeys(("batch", "sq", "slots"), "i32") | {"STORED": stored}
    warps = 16 if width > 128 else 4
    return ahead(top_kernel, shared, num_warps=warps, wide_loads=True), ahead(
        value_kernel, shared | rest, num_warps=warps, wide_loads=True
    )


AOT = [*_ahead("bf16", 128, True), *_ahead("fp16", 80, False), *_ahead("fp32", 256, False)]
