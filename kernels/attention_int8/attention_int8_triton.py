"""attention_int8 in Triton: scores from int8 products of q and centred keys, then as attention_triton.py.

Three kernels: partial sums of the keys (always PARTS per sequence and head, so that the mean does not depend
on the batch), the codes of the keys, and attention itself, which makes the codes of its rows of q as it
starts. The int32 scores become float32 by an addition: |q^ . k^| <= 127 * 127 * 256 < 2^22.

The sums over v are those of attention, or, in attention_all_int8, those of the all-integer form in
attention_int8_values_triton.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.attention_checks import Attention, attention_arguments
from ..attention.attention_triton import (
    LOG2E,
    NOTHING,
    SIZES,
    add_values,
    arch_of,
    blocks_of,
    constants,
    key_span,
    load,
    place,
    seen,
    shapes_ahead,
    softmax_step,
    start_softmax,
    store_rows,
    tanh,
    tiles_for,
    widths,
)
from ..common.triton_util import ahead, codes, inverse_of, is_finite, launch, next_power_of_2, scale_of
from .attention_int8_values_triton import (
    KEYS,
    PARTS,
    SUMMED,
    first_slot,
    integer_step,
    quantize_values,
    shares_of,
)


@triton.jit(do_not_specialize=["kv_heads", "sk"])
def sum_kernel(
    k, cu_k, sums, k_batch, k_head, k_row, kv_heads, sk,
    D: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """sums float32 [B, Hkv, PARTS, D]: of the finite keys of a piece."""
    pid = tl.program_id(0)
    part, rest = pid % PARTS, pid // PARTS
    b, kv_head = rest // kv_heads, rest % kv_heads
    first, length = sk * 0, sk
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_k + b), 0), sk)
        length = tl.minimum(tl.maximum(tl.load(cu_k + b + 1), first), sk) - first
    size = tl.cdiv(tl.cdiv(length, PARTS), KEYS) * KEYS
    k += b.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head + first.to(tl.int64) * k_row
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(part * size, tl.minimum(part * size + size, length), KEYS):
        row = start + tl.arange(0, KEYS)
        inside = (row < length)[:, None] & (d < D)[None, :]
        x = tl.load(k + row.to(tl.int64)[:, None] * k_row + d[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(tl.where(is_finite(x), x, 0.0), 0)
    tl.store(sums + pid.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["batch", "kv_heads", "sq", "sk", "total"])
def key_kernel(
    k, cu_k, cu_q, sums, key_codes, key_scales, means, k_batch, k_head, k_row, batch, kv_heads, sq, sk, total,
    D: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """key_codes int8 [Hkv, total, STORED], zeros behind D; key_scales [Hkv, total]; means [B, Hkv, D]."""
    b, kv_head, row0, k0, q0, keys, queries = place(
        cu_k, cu_q, batch, kv_heads, sk, sq, 1, KEYS, PACKED, False
    )
    if row0 >= keys:
        return
    b64, kv64 = b.to(tl.int64), kv_head.to(tl.int64)
    d, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    at = (b64 * kv_heads + kv64) * D
    pieces = sums + at * PARTS + part[:, None] * D + d[None, :]
    mean = tl.sum(tl.load(pieces, mask=(d < D)[None, :], other=0.0), 0)
    mean = tl.div_rn(mean, keys.to(tl.float32) + tl.zeros_like(mean))
    mean = tl.where(is_finite(mean), mean, 0.0)
    if row0 == 0:
        tl.store(means + at + d, mean, mask=d < D)
    row = row0 + tl.arange(0, KEYS)
    inside = (row < keys)[:, None] & (d < D)[None, :]
    row = (k0 + row).to(tl.int64)
    x = tl.load(k + b64 * k_batch + kv64 * k_head + row[:, None] * k_row + d[None, :], mask=inside, other=0.0)
    x = tl.where(inside, x.to(tl.float32) - mean[None, :], 0.0)
    code, scale = row_codes(x)
    if not PACKED:
        row += b64 * sk
    row += kv64 * total
    valid = row0 + tl.arange(0, KEYS) < keys
    stored = valid[:, None] & (d < STORED)[None, :]
    tl.store(key_codes + row[:, None] * STORED + d[None, :], code, mask=stored)
    tl.store(key_scales + row, scale, mask=valid)


@triton.jit
def row_codes(x):
    """Codes of float32 rows and their scales; a row that is not finite: zeros, and NaN for its scale."""
    finite = tl.min(is_finite(x).to(tl.int32), 1) > 0
    scale = scale_of(tl.max(tl.where(is_finite(x), tl.abs(x), 0.0), 1), 127.0)
    code = tl.where(finite[:, None], codes(x * inverse_of(scale)[:, None], 0, -127, 127), 0)
    return code.to(tl.int8), tl.where(finite, scale, float("nan"))


@triton.jit
def _tiles(
    sums, sums_tail, m, total, q, q_tail, q_factor, back, k, k_scales, v, v_logs, v_inverses, v_sums,
    bias, bias_rows, valid, positions, length, window, v_row, bias_key, cap, begin, middle, resume, end,
    DV: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, V_MAIN: tl.constexpr, V_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, BACK: tl.constexpr, INTEGER: tl.constexpr,
    MASKED: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Goes on over the keys begin .. middle and resume .. end."""
    d, lane = tl.arange(0, MAIN), tl.arange(0, BLOCK_N)
    before = (middle - begin) // BLOCK_N
    for i in range(0, before + tl.cdiv(end - resume, BLOCK_N)):
        start = begin + i * BLOCK_N
        if MASKED:
            start = tl.where(i < before, start, resume + (i - before) * BLOCK_N)
        start = tl.multiple_of(start, BLOCK_N)
        keys = start + lane
        inside = keys < length
        at = k + start.to(tl.int64) * (MAIN + TAIL) + lane[None, :] * (MAIN + TAIL) + d[:, None]
        product = tl.dot(q, load(at, inside[None, :], inside[None, :], MASKED, False), out_dtype=tl.int32)
        if TAIL > 0:
            at = k + start.to(tl.int64) * (MAIN + TAIL) + lane[None, :] * (MAIN + TAIL)
            at += MAIN + tl.arange(0, TAIL)[:, None]
            part = load(at, inside[None, :], inside[None, :], MASKED, False)
            product = tl.dot(q_tail, part, product, out_dtype=tl.int32)
        s = (product + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
        s *= load(k_scales + keys, inside, inside, MASKED, False)[None, :]
        factor = q_factor
        if BACK or BIAS:
            s *= factor[:, None]
            if BACK:
                s += back[:, None]
            if SOFTCAP:
                s = cap * tanh(s / cap)
            if BIAS:
                pointers = bias + bias_rows[:, None] + keys.to(tl.int64)[None, :] * bias_key
                added = tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0)
                s += added.to(tl.float32) * LOG2E
            factor = tl.where(valid, 1.0, 1.0)
        if INTEGER:
            y = s * factor[:, None] + tl.load(v_logs + keys)[None, :]
            s = tl.where(s == NOTHING, s, y) if BIAS else y  # a bias of -inf hides a key that is not finite
        if MASKED:
            s = tl.where(seen(positions, keys, length, window, CAUSAL, WINDOW), s, NOTHING)
        if INTEGER:
            sums, sums_tail, m, total = integer_step(
                sums, sums_tail, m, total, s, v, v_sums, tl.load(v_inverses + keys), start, v_row,
                V_MAIN, V_TAIL, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            p, older, m, total = softmax_step(s, factor[:, None], factor, m, total)
            sums, sums_tail = add_values(
                sums, sums_tail, p, s, older, v, start, inside, v_row, DV, V_MAIN, V_TAIL, BLOCK_N, MASKED,
                GUARD,
            )  # fmt: skip
    return sums, sums_tail, m, total


@triton.jit(do_not_specialize=[*SIZES, "total_keys"])
def attention_int8_kernel(
    q, key_codes, key_scales, means, v, v_logs, v_inverses, v_sums, v_scale, bias, sinks, cu_q, cu_k, out,
    q_batch, q_head, q_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    bias_batch, bias_head, bias_query, bias_key, batch, kv_heads, sq, sk, total_keys, scale, cap, window,
    D: tl.constexpr, DV: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr,
    INTEGER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    b, kv_head, row0, q0, k0, queries, keys = place(
        cu_q, cu_k, batch, kv_heads, sq, sk, GROUP, BLOCK_M, PACKED, CAUSAL
    )
    rows = queries * GROUP
    if row0 >= rows:
        return
    b = b.to(tl.int64)
    r = row0 + tl.arange(0, BLOCK_M)
    valid = r < rows
    query, head = r // GROUP, kv_head * GROUP + r % GROUP
    row = (q0 + query).to(tl.int64)
    positions = query + (keys - queries)
    head64, kv64 = head.to(tl.int64), kv_head.to(tl.int64)
    BACK: tl.constexpr = SOFTCAP or SINKS  # what sees the part of the mean, which softmax does not

    at = q + b * q_batch + (row * q_row + head64 * q_head)[:, None]
    mean_at = means + (b * kv_heads + kv64) * D
    d = tl.arange(0, MAIN)
    x = load(at + d[None, :], valid[:, None], (d < D)[None, :], True, MAIN > D).to(tl.float32) * scale
    wild = tl.max((is_finite(x) == 0).to(tl.int32), 1)
    largest = tl.max(tl.where(is_finite(x), tl.abs(x), 0.0), 1)
    back = tl.zeros([BLOCK_M], tl.float32)
    has_mean = keys > 0
    if BACK:
        back = tl.sum(x * tl.load(mean_at + d, mask=(d < D) & has_mean, other=0.0)[None, :], 1)
    x_tail = x
    if TAIL > 0:
        d_tail = MAIN + tl.arange(0, TAIL)
        x_tail = load(at + d_tail[None, :], valid[:, None], (d_tail < D)[None, :], True, MAIN + TAIL > D)
        x_tail = x_tail.to(tl.float32) * scale
        wild = tl.maximum(wild, tl.max((is_finite(x_tail) == 0).to(tl.int32), 1))
        largest = tl.maximum(largest, tl.max(tl.where(is_finite(x_tail), tl.abs(x_tail), 0.0), 1))
        if BACK:
            mean = tl.load(mean_at + d_tail, mask=(d_tail < D) & has_mean, other=0.0)
            back += tl.sum(x_tail * mean[None, :], 1)
    q_scale = scale_of(largest, 127.0)
    inverse = inverse_of(q_scale)[:, None]
    q_main = codes(x * inverse, 0, -127, 127).to(tl.int8)
    q_tail = q_main
    if TAIL > 0:
        q_tail = codes(x_tail * inverse, 0, -127, 127).to(tl.int8)
    q_factor = tl.where(wild > 0, float("nan"), q_scale) * LOG2E
    back *= LOG2E

    key0 = kv64 * total_keys + k0
    if not PACKED:
        key0 += b * sk
    k = key_codes + key0 * (MAIN + TAIL)
    k_scales = key_scales + key0
    if INTEGER:  # v are codes [Hkv, column, key]
        slot = kv64 * (v_row // KEYS) + first_slot(b, k0, sk, PACKED)
        v += kv64 * v_head + (slot - kv64 * (v_row // KEYS)) * KEYS
        v_logs += slot * KEYS
        v_inverses += slot * KEYS
        v_sums += slot * (KEYS // SUMMED) * (V_MAIN + V_TAIL)
    else:
        v += b * v_batch + kv64 * v_head + k0.to(tl.int64) * v_row
    bias_rows = b * bias_batch + head64 * bias_head + query.to(tl.int64) * bias_query
    first = row0 // GROUP + keys - queries
    last = (tl.minimum(row0 + BLOCK_M, rows) - 1) // GROUP + keys - queries
    begin, end, inner, outer = key_span(first, last, keys, window, CAUSAL, WINDOW, BLOCK_N)

    m, total = start_softmax(sinks, tl.where(valid, head, 0), SINKS, BLOCK_M)
    sums = tl.zeros([BLOCK_M, V_MAIN], tl.float32)
    sums_tail = tl.zeros([BLOCK_M, V_TAIL if V_TAIL > 0 else 16], tl.float32)
    sums, sums_tail, m, total = _tiles(
        sums, sums_tail, m, total, q_main, q_tail, q_factor, back, k, k_scales, v, v_logs, v_inverses,
        v_sums, bias, bias_rows, valid, positions, keys, window, v_row, bias_key, cap, inner, outer, outer, outer,
        DV, MAIN, TAIL, V_MAIN, V_TAIL, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, BIAS, BACK, INTEGER,
        False, BIAS,
    )  # fmt: skip
    sums, sums_tail, m, total = _tiles(
        sums, sums_tail, m, total, q_main, q_tail, q_factor, back, k, k_scales, v, v_logs, v_inverses,
        v_sums, bias, bias_rows, valid, positions, keys, window, v_row, bias_key, cap, begin, inner, outer, end,
        DV, MAIN, TAIL, V_MAIN, V_TAIL, BLOCK_M, EDGE_N, CAUSAL, WINDOW, SOFTCAP, BIAS, BACK, INTEGER,
        True, CAUSAL or WINDOW or BIAS,
    )  # fmt: skip
    if INTEGER:
        factor = tl.load(v_scale + b * kv_heads + kv64, mask=has_mean, other=1.0)
        sums = shares_of(sums, total, factor)
        if V_TAIL > 0:
            sums_tail = shares_of(sums_tail, total, factor)
        total = tl.where(total == 0.0, 0.0, 1.0)
    at = b * out_batch + row * out_row + head64 * out_head
    store_rows(out, at, sums, total, valid, DV, 0, V_MAIN)
    if V_TAIL > 0:
        store_rows(out, at, sums_tail, total, valid, DV, V_MAIN, V_TAIL)


def quantize_keys(a: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [Hkv, keys, stored depth], scales float32 [Hkv, keys], means float32 [B, Hkv, D]."""
    packed, (main, tail) = a.cu_q is not None, widths(a.depth, 32)
    total = a.sk if packed else a.batch * a.sk
    key_codes = a.k.new_empty((a.kv_heads, total, main + tail), dtype=torch.int8)
    key_scales = a.k.new_empty((a.kv_heads, total), dtype=torch.float32)
    means = a.k.new_empty((a.batch, a.kv_heads, a.depth), dtype=torch.float32)
    if key_scales.numel() == 0:
        return key_codes, key_scales, means
    sums = a.k.new_empty((a.batch, a.kv_heads, PARTS.value, a.depth), dtype=torch.float32)
    width = triton.next_power_of_2(main + tail)
    warps = 16 if width > 128 else 4
    launch(
        sum_kernel, (a.batch * a.kv_heads * PARTS.value,), a.k, a.cu_k, sums, *a.strides(a.k), a.kv_heads, a.sk,
        on=a.k, D=a.depth, WIDTH=width, PACKED=packed, num_warps=warps,
    )  # fmt: skip
    blocks = a.sk // KEYS.value + a.batch if packed else a.batch * triton.cdiv(a.sk, KEYS.value)
    launch(
        key_kernel, (blocks * a.kv_heads,), a.k, a.cu_k, a.cu_q, sums, key_codes, key_scales, means,
        *a.strides(a.k), a.batch, a.kv_heads, a.sq, a.sk, total,
        on=a.k, D=a.depth, WIDTH=width, STORED=main + tail, PACKED=packed, num_warps=warps,
    )  # fmt: skip
    return key_codes, key_scales, means


def attention_int8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None,
    causal: bool = False, window: int = 0, softcap: float = 0.0, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    a = attention_arguments(
        "attention_int8", q, k, v, bias, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k, sinks
    )
    return _run(a, False)


def attention_all_int8(q: Tensor, k: Tensor, v: Tensor, *arguments, **options) -> Tensor:
    """The op with weights and v rounded to 8 bits as well, which it never does unasked. Arguments of attention_int8."""
    return _run(attention_arguments("attention_int8", q, k, v, *arguments, **options), True)


def _run(a: Attention, integer_values: bool) -> Tensor:
    out = a.q.new_empty((*a.q.shape[:-1], a.v_depth))
    if out.numel() == 0:
        return out
    keys = quantize_keys(a)
    values, v_strides = (a.v, None, None, None, None), a.strides(a.v)
    if integer_values:
        values = quantize_values(a)
        v_strides = (0, *values[0].stride()[:2])
    tile = int8_tiles_for(a, arch_of(a.q), integer_values)
    launch(
        attention_int8_kernel, (blocks_of(a, tile["BLOCK_M"]) * a.kv_heads,),
        a.q, *keys, *values, a.bias, a.sinks, a.cu_q, a.cu_k, out,
        *a.strides(a.q), *v_strides, *a.strides(out), *a.bias_strides(),
        a.batch, a.kv_heads, a.sq, a.sk, keys[1].shape[1], a.scale, a.softcap * LOG2E.value, a.window,
        on=a.q, **constants(a, 32), INTEGER=integer_values, enable_fp_fusion=True, **tile,
    )  # fmt: skip
    return out


#: As in attention, for integer values: the sums of a tile take as many registers as the sums of all. sm_100 and later
#: multiply 8 bits by the instructions of sm_80.
_INTEGER_TILES = {
    80: ((128, 64, 32, 8, 3), (64, 64, 32, 8, 2), (64, 32, 32, 8, 2)),
    90: ((128, 64, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 8, 2)),
}


def int8_tiles_for(a: Attention, arch: int, integer_values: bool = False) -> dict:
    """Those of attention, but for rows of q, which are held in float32 while their codes are made."""
    if integer_values:
        wide, rows = max(a.depth, a.v_depth), a.sq * a.group
        few = a.cu_q is None and rows < 64
        table = _INTEGER_TILES[90 if 90 <= arch < 100 and not few else 80]
        m, n, edge, warps, stages = table[(wide > 64) + (wide > 128)]
        m = min(m, 64) if a.bias is not None else m
        if few:
            m, warps = max(16, next_power_of_2(rows)), 4
        return {"BLOCK_M": m, "BLOCK_N": n, "EDGE_N": edge, "num_warps": warps, "num_stages": stages}
    tile = tiles_for(a, arch)
    if tile["num_warps"] == 8 and (a.bias is not None or max(a.depth, a.v_depth) > 128):
        tile["BLOCK_M"] = min(tile["BLOCK_M"], 64)
    return tile


def _ahead(arch: int, dtype: str, depth: int, rows: int = 512, integer: bool = False, **options):
    a = shapes_ahead(dtype, depth, rows, "bias" in options)
    tile = int8_tiles_for(a, arch, integer)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    names = attention_int8_kernel.arg_names
    arguments = dict.fromkeys(names[names.index("q_batch") : names.index("batch")], "i32:16")
    arguments |= dict.fromkeys(names[names.index("batch") : names.index("D")], "i32")
    arguments |= dict.fromkeys(("q", "v", "out"), f"*{dtype}") | {"scale": "fp32", "cap": "fp32"}
    arguments |= {"key_codes": "*i8", "key_scales": "*fp32", "means": "*fp32"}
    arguments |= dict.fromkeys(("bias", "sinks", "cu_q", "cu_k", "v_logs", "v_inverses", "v_sums", "v_scale"))
    if integer:
        arguments |= {"v": "*i8", "v_sums": "*i32"}
        arguments |= dict.fromkeys(("v_logs", "v_inverses", "v_scale"), "*fp32")
    constant = constants(a, 32) | tile | {"INTEGER": integer}
    return ahead(
        attention_int8_kernel, arguments | constant | options, num_warps=warps,
        num_stages=stages, fp_fusion=True, tensor_cores="s8" if integer else True, wide_loads=True,
        architectures=((80, 100), (90,))[arch >= 90] if integer else ((80,), (90, 100))[arch >= 90],
    )  # fmt: skip


def _keys_ahead(dtype: str, depth: int, packed: bool):
    main, tail = widths(depth, 32)
    width = triton.next_power_of_2(main + tail)
    strides = dict.fromkeys(("k_batch", "k_head", "k_row"), "i32:16")
    shared = {"k": f"*{dtype}", "cu_k": "*i32" if packed else None, "sums": "*fp32", "PACKED": packed}
    shared |= strides | {"kv_heads": "i32", "sk": "i32", "D": depth, "WIDTH": width}
    rest = {"cu_q": "*i32" if packed else None, "key_codes": "*i8", "key_scales": "*fp32", "means": "*fp32"}
    rest |= dict.fromkeys(("batch", "sq", "total"), "i32") | {"STORED": main + tail}
    warps = 16 if width > 128 else 4
    return ahead(sum_kernel, shared, num_warps=warps), ahead(
        key_kernel, shared | rest, num_warps=warps, wide_loads=True
    )


_EVERYTHING = {"bias": "*fp16", "sinks": "*fp32", "WINDOW": True, "SOFTCAP": True, "SINKS": True}
_PACKED = {"cu_q": "*i32", "cu_k": "*i32", "PACKED": True}
AOT = (
    [
        _ahead(arch, dtype, depth, **options)
        for arch in (80, 90)
        for dtype, depth, options in (
            ("fp16", 64, {}),
            ("bf16", 128, _PACKED),
            ("bf16", 80, {}),
            ("fp16", 96, {}),
            ("fp16", 256, {}),
            ("fp16", 128, _EVERYTHING),
            ("bf16", 128, {"rows": 4}),
            ("fp32", 64, {}),
            ("fp32", 128, {}),
        )
    ]
    + [
        _ahead(arch, dtype, depth, integer=True, **options)
        for arch in (80, 90)
        for dtype, depth, options in (
            ("fp16", 64, {}),
            ("bf16", 128, _PACKED),
            ("bf16", 80, {}),
            ("fp16", 256, {}),
            ("fp16", 128, _EVERYTHING),
            ("bf16", 128, {"rows": 4}),
            ("fp32", 128, {}),
        )
    ]
    + [*_keys_ahead("bf16", 128, True), *_keys_ahead("fp16", 80, False), *_keys_ahead("fp32", 256, False)]
)
