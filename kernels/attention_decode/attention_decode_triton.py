"""attention_decode in Triton: chunks of a cache side by side, merged in order by a second kernel.

A sequence is cut by its own length only (``_cut``), so its result has the same bits whatever the batch.
Few rows per K/V head are split like this; more of them (a prompt) go over the cache block by block.
INT8 keys meet q in its own type, their scales multiply the scores. The scales of INT8 values multiply the
weights, as shares of the largest in the tile, which multiplies the products: float16 weights keep their range.

Lengths and pages are not checked on a GPU, where reading them would make the host wait: what lies outside of
the cache is cut off, pages that do not exist become the nearest that does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.attention_checks import (
    MOST_KEYS,
    checked_scale,
    dense_rows,
    require_heads,
    require_rank,
    require_vector,
)
from ..attention.attention_triton import (
    LOG2E,
    NOTHING,
    arch_of,
    keep_apart,
    key_span,
    load,
    positive_scale,
    seen,
    sign_of,
    softmax_step,
    start_softmax,
    store_rows,
    tanh,
)
from ..common.checks import FLOATING, describe, fail, name, require, require_device
from ..common.triton_util import ahead, launch, next_power_of_2

#: Keys of a chunk, doubled until a sequence has at most so many chunks.
CHUNK, MOST_CHUNKS = tl.constexpr(256), tl.constexpr(64)
#: As SIZES of attention_triton.py.
SIZES = ["kv_heads", "queries", "capacity", "pages", "table_width", "chunk_count", "window"]
#: Rows per K/V head up to which a sequence is split.
SPLIT_ROWS = 64


@triton.jit
def _cut(length, queries, window, WINDOW: tl.constexpr):
    """First key of a sequence that any query sees, keys per chunk, number of chunks."""
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - queries - window + 1, 0)
    size = length * 0 + CHUNK
    while length - first > size * MOST_CHUNKS:
        size = size * 2
    return first, size, tl.maximum(tl.cdiv(length - first, size), 1)


@triton.jit
def _tiles(
    sums, m, total, q, k, v, k_scale, v_scale, table, positions, length, window, pages,
    k_outer, k_slot, v_outer, v_slot, ks_outer, ks_slot, vs_outer, vs_slot, factor, cap,
    begin, middle, resume, end,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Goes on over the keys begin .. middle and resume .. end."""
    INT8: tl.constexpr = k.dtype.element_ty == tl.int8
    d = tl.arange(0, WIDTH)
    before = (middle - begin) // BLOCK_N
    for i in range(0, before + tl.cdiv(end - resume, BLOCK_N)):
        start = begin + i * BLOCK_N
        if MASKED:
            start = tl.where(i < before, start, resume + (i - before) * BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        slot = keys.to(tl.int64)
        page = slot * 0
        if PAGE > 0:
            page = load(table + keys // PAGE, inside, inside, MASKED, False)
            page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
            slot = (keys % PAGE).to(tl.int64)
        at = k + (page * k_outer + slot * k_slot)[None, :] + d[:, None]
        part = load(at, inside[None, :], (d < D)[:, None], MASKED, WIDTH > D)
        s = tl.dot(q, part.to(q.dtype), input_precision="ieee")
        if INT8:
            s *= load(k_scale + page * ks_outer + slot * ks_slot, inside, inside, MASKED, False)[None, :]
        scale = factor
        if SOFTCAP:
            s = cap * tanh(s * (factor / cap))
            scale = 1.0
        if MASKED:
            visible = inside[None, :]
            if CAUSAL:
                visible = visible & seen(positions, keys, length, window, True, WINDOW)
            s = tl.where(visible, s, NOTHING)
        p, older, m, total = softmax_step(s, scale, scale, m, total)
        at = v + (page * v_outer + slot * v_slot)[:, None] + d[None, :]
        part = load(at, inside[:, None], (d < D)[None, :], MASKED, WIDTH > D)
        if INT8:
            scales = load(v_scale + page * vs_outer + slot * vs_slot, inside, inside, MASKED, False)
            largest = tl.max(tl.abs(scales), 0)
            largest = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
            p = p * (scales / largest)[None, :]
            if MASKED:
                p = tl.where(s == NOTHING, 0.0, p)  # a scale may be NaN behind the mask
            product = tl.dot(p.to(q.dtype), part.to(q.dtype), input_precision="ieee")
            sums = sums * older[:, None] + product * largest
        else:
            if MASKED and CAUSAL:
                p, part = keep_apart(p, s, part)
            sums = tl.dot(p.to(q.dtype), part.to(q.dtype), sums * older[:, None], input_precision="ieee")
    return sums, m, total


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q, k, v, k_scale, v_scale, lengths, table, sinks, out, parts, tops,
    q_batch, q_head, q_row, k_outer, k_head, k_slot, v_outer, v_head, v_slot,
    ks_outer, ks_head, ks_slot, vs_outer, vs_head, vs_slot, out_batch, out_head, out_row,
    kv_heads, queries, capacity, pages, table_width, chunk_count, scale, cap, window,
    D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, ONE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SIGN: tl.constexpr,
    WIDE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk (SPLIT) or all keys, of a block of rows of one K/V head (rows: attention_triton.py)."""
    pid = tl.program_id(0)
    chunk = pid * 0
    if SPLIT:
        chunk, pid = pid % chunk_count, pid // chunk_count
    rows = queries * GROUP
    blocks = tl.cdiv(rows, BLOCK_M)
    block, pid = pid % blocks, pid // blocks
    b, kv_head = pid // kv_heads, pid % kv_heads
    length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), capacity)

    row0 = block * BLOCK_M
    r = row0 + tl.arange(0, BLOCK_M)
    valid = r < rows
    query, head = r // GROUP, kv_head * GROUP + r % GROUP
    positions = query + (length - queries)
    if SPLIT:
        first, size, chunks = _cut(length, queries, window, WINDOW)
        if chunk >= chunks:
            return
        begin = first + chunk * size
        end = tl.maximum(tl.minimum(begin + size, length), begin)
        inner, outer = begin, begin
        if ONE:  # every row sees every key from `first` on
            outer = begin + (end - begin) // BLOCK_N * BLOCK_N
    else:
        chunks = pid * 0 + 1
        last = (tl.minimum(row0 + BLOCK_M, rows) - 1) // GROUP
        begin, end, inner, outer = key_span(
            row0 // GROUP + length - queries, last + length - queries, length, window, True, WINDOW, BLOCK_N
        )

    b64, kv64, head64 = b.to(tl.int64), kv_head.to(tl.int64), head.to(tl.int64)
    d = tl.arange(0, WIDTH)
    at = q + b64 * q_batch + (query.to(tl.int64) * q_row + head64 * q_head)[:, None] + d[None, :]
    q_tile = load(at, valid[:, None], (d < D)[None, :], True, WIDTH > D)
    if WIDE:  # the cache has another type than q
        q_tile = q_tile.to(tl.float32)
    if SIGN != 1:
        q_tile = (q_tile * SIGN).to(q_tile.dtype)
    k += kv64 * k_head
    v += kv64 * v_head
    if PAGE > 0:
        table += b64 * table_width
        ks_at, vs_at = kv64 * ks_head, kv64 * vs_head
    else:
        k += b64 * k_outer
        v += b64 * v_outer
        ks_at, vs_at = kv64 * ks_head + b64 * ks_outer, kv64 * vs_head + b64 * vs_outer
    if k.dtype.element_ty == tl.int8:
        k_scale += ks_at
        v_scale += vs_at

    m, total = start_softmax(sinks, tl.where(valid, head, 0), SINKS, BLOCK_M)
    if SINKS:  # joins once: here, or when chunks are merged
        m = tl.where(chunks > 1, NOTHING, m)
        total = tl.where(chunks > 1, 0.0, total)
    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    sums, m, total = _tiles(
        sums, m, total, q_tile, k, v, k_scale, v_scale, table, positions, length, window, pages,
        k_outer, k_slot, v_outer, v_slot, ks_outer, ks_slot, vs_outer, vs_slot, scale, cap,
        inner, outer, outer, outer, D, WIDTH, BLOCK_N, PAGE, not ONE, WINDOW, SOFTCAP, False,
    )  # fmt: skip
    sums, m, total = _tiles(
        sums, m, total, q_tile, k, v, k_scale, v_scale, table, positions, length, window, pages,
        k_outer, k_slot, v_outer, v_slot, ks_outer, ks_slot, vs_outer, vs_slot, scale, cap,
        begin, inner, outer, end, D, WIDTH, BLOCK_N, PAGE, not ONE, WINDOW, SOFTCAP, True,
    )  # fmt: skip

    target = b64 * out_batch + head64 * out_head + query.to(tl.int64) * out_row
    if parts is None:  # noqa: SIM114  (known when compiled: not one condition with the next)
        store_rows(out, target, sums, total, valid, D, 0, WIDTH)
    elif chunks == 1:
        store_rows(out, target, sums, total, valid, D, 0, WIDTH)
    else:
        slot = ((b64 * kv_heads + kv_head) * rows + r) * chunk_count + chunk
        tl.store(parts + slot[:, None] * D + d[None, :], sums, mask=valid[:, None] & (d < D)[None, :])
        tl.store(tops + slot * 2, m, mask=valid)
        tl.store(tops + slot * 2 + 1, total, mask=valid)


@triton.jit(do_not_specialize=["kv_heads", "queries", "capacity", "chunk_count", "window"])
def merge_kernel(
    parts, tops, lengths, sinks, out, out_batch, out_head, out_row,
    kv_heads, queries, capacity, chunk_count, window,
    D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The chunks of one row, always in the same order: sums scaled to the largest maximum."""
    pid = tl.program_id(0)
    rows = queries * GROUP
    r, rest = pid % rows, pid // rows
    b, head = rest // kv_heads, rest % kv_heads * GROUP + r % GROUP
    length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), capacity)
    first, size, chunks = _cut(length, queries, window, WINDOW)
    if chunks == 1:
        return
    slot = pid.to(tl.int64) * chunk_count
    chunk = tl.arange(0, MOST_CHUNKS)
    tops += slot * 2
    m = tl.load(tops + chunk * 2, mask=chunk < chunks, other=NOTHING)
    top = tl.max(m, 0)
    if SINKS:
        sink = tl.load(sinks + head) * LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == NOTHING, 0.0, top)
    totals = tl.load(tops + chunk * 2 + 1, mask=chunk < chunks, other=0.0)
    total = tl.sum(totals * tl.exp2(m - base), 0)
    if SINKS:
        total += tl.exp2(sink - base)
    d = tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], tl.float32)
    for start in range(0, chunks, 16):
        some = start + tl.arange(0, 16)
        inside = some < chunks
        weights = tl.exp2(tl.load(tops + some * 2, mask=inside, other=NOTHING) - base)
        part = tl.load(
            parts + (slot + some)[:, None] * D + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )
        sums += tl.sum(part * weights[:, None], 0)
    at = b.to(tl.int64) * out_batch + head.to(tl.int64) * out_head + (r // GROUP).to(tl.int64) * out_row
    result = sums * tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.store(out + at + d, result.to(out.dtype.element_ty), mask=d < D)


def tile_for(arch: int, wide: bool, int8: bool, rows: int, depth: int) -> dict:
    if wide:  # no tensor cores
        return {"BLOCK_M": 16, "BLOCK_N": 32 if depth <= 128 else 16, "num_warps": 8, "num_stages": 1}
    block_m = min(max(next_power_of_2(rows), 16), 64)
    block_n = 64 if depth <= 128 and block_m < 64 else 32
    if depth <= 64 and block_m < 32:
        block_n = 128
    warps = 8 if depth > 128 or (int8 and (arch >= 90 or block_m == 64)) else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 2 if arch < 90 else 3}


def _require_scales(op: str, argument: str, scale: Tensor, cache: Tensor) -> None:
    if scale.dtype != torch.float32 or scale.shape != cache.shape[:3]:
        fail(
            op,
            f"{argument} must be float32 of the shape of its int8 cache without D, {list(cache.shape)}, "
            f"got {describe(scale)}",
        )
    require_device(op, argument, scale, cache.device)


def _checked(
    op: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, table: Tensor | None, sinks: Tensor | None,
) -> tuple:  # fmt: skip
    require_rank(op, "q", q, 4, "[B, Hq, Sq, D]")
    form = "[B, Hkv, C, D]" if table is None else "[P, Hkv, page, D]"
    if k.dtype not in (*FLOATING, torch.int8) or k.dim() != 4:
        fail(op, f"k_cache must be float32, float16, bfloat16 or int8 {form}, got {describe(k)}")
    if v.dtype != k.dtype or v.shape != k.shape:
        fail(op, f"v_cache must have the dtype and shape of k_cache, {describe(k)}, got {describe(v)}")
    if k.shape[3] != q.shape[3] or (table is None and k.shape[0] != q.shape[0]):
        fail(op, f"k_cache must have the batch and head size of q, {list(q.shape)}, got {list(k.shape)}")
    require_heads(op, "k_cache", q.shape[1], k.shape[1])
    require(q.shape[3] <= 256, op, f"q must have a head size of at most 256 on a GPU, got {q.shape[3]}")
    for argument, t in (("k_cache", k), ("v_cache", v)):
        require_device(op, argument, t, q.device)
    lengths = require_vector(op, "lengths", lengths, torch.int32, q.shape[0], q.device)
    capacity = k.shape[2]
    if table is not None:
        if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != q.shape[0]:
            fail(op, f"block_table must be contiguous int32 [B, pages], got {describe(table)}")
        require_device(op, "block_table", table, q.device)
        table = table.contiguous()
        capacity = k.shape[2] * table.shape[1] if k.shape[0] else 0
    group = q.shape[1] // max(k.shape[1], 1)
    require(
        capacity < MOST_KEYS and q.shape[2] * group < MOST_KEYS,
        op,
        f"k_cache must be shorter than 2^30, got {capacity}",
    )
    if k.dtype == torch.int8:
        if k_scale is None or v_scale is None:
            fail(op, "k_scale and v_scale must be given for int8 caches")
        _require_scales(op, "k_scale", k_scale, k)
        _require_scales(op, "v_scale", v_scale, v)
    elif k_scale is not None or v_scale is not None:
        fail(op, f"k_scale and v_scale must be absent for {name(k.dtype)} caches")
    if sinks is not None:
        sinks = require_vector(op, "sinks", sinks, torch.float32, q.shape[1], q.device)
    return dense_rows(q), dense_rows(k), dense_rows(v), lengths, table, sinks, capacity, group


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, scale: float | None = None, window: int = 0, softcap: float = 0.0,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    op = "attention_decode"
    q, k, v, lengths, table, sinks, capacity, group = _checked(
        op, q, k_cache, v_cache, lengths, k_scale, v_scale, block_table, sinks
    )
    batch, heads, queries, depth = q.shape
    scale = checked_scale(op, scale, softcap, window, depth)
    window = min(window, MOST_KEYS)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    int8, rows = k.dtype == torch.int8, queries * group
    wide = q.dtype == torch.float32 or not (int8 or k.dtype == q.dtype)
    tile = tile_for(arch_of(q), wide, int8, rows, depth)
    split = rows <= SPLIT_ROWS
    span = min(capacity, queries + window) if window else capacity
    chunks = max(1, min(triton.cdiv(span, CHUNK.value), MOST_CHUNKS.value)) if split else 1
    parts = tops = None
    if chunks > 1:
        parts = q.new_empty(batch * k.shape[1] * rows * chunks * depth, dtype=torch.float32)
        tops = q.new_empty(batch * k.shape[1] * rows * chunks * 2, dtype=torch.float32)
    none = (0, 0, 0)
    common = {"D": depth, "WIDTH": max(next_power_of_2(depth), 16), "GROUP": group, "WINDOW": window > 0,
              "SINKS": sinks is not None, "enable_fp_fusion": True}  # fmt: skip
    launch(
        decode_kernel, (batch * k.shape[1] * triton.cdiv(rows, tile["BLOCK_M"]) * chunks,),
        q, k, v, k_scale, v_scale, lengths, table, sinks, out, parts, tops,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(k_scale.stride() if int8 else none), *(v_scale.stride() if int8 else none), *out.stride()[:3],
        k.shape[1], queries, capacity, k.shape[0], table.shape[1] if table is not None else 0, chunks,
        positive_scale(scale), softcap * LOG2E.value, window,
        on=q, **common, PAGE=k.shape[2] if table is not None else 0, ONE=queries == 1, SOFTCAP=softcap > 0,
        SIGN=sign_of(scale), WIDE=wide, SPLIT=split, **tile,
    )  # fmt: skip
    if chunks > 1:
        launch(
            merge_kernel, (batch * k.shape[1] * rows,), parts, tops, lengths, sinks, out, *out.stride()[:3],
            k.shape[1], queries, capacity, chunks, window, on=q, **common,
        )  # fmt: skip
    return out


def _ahead(arch: int, q: str, cache: str, depth: int, rows: int, page: int = 0, **options):
    tile = tile_for(arch, q == "fp32", cache == "i8", rows, depth)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    names = decode_kernel.arg_names
    arguments = dict.fromkeys(names[names.index("q_batch") : names.index("kv_heads")], "i32:16")
    arguments |= dict.fromkeys(names[names.index("kv_heads") : names.index("D")], "i32")
    arguments |= dict.fromkeys(("q", "out"), f"*{q}") | dict.fromkeys(("k", "v"), f"*{cache}")
    arguments |= dict.fromkeys(("k_scale", "v_scale"), "*fp32" if cache == "i8" else None)
    arguments |= {"lengths": "*i32", "table": "*i32" if page else None, "sinks": None, "PAGE": page}
    split = rows <= SPLIT_ROWS
    arguments |= dict.fromkeys(("parts", "tops"), "*fp32" if split else None)
    arguments |= {
        "scale": "fp32", "cap": "fp32", "D": depth, "WIDTH": max(next_power_of_2(depth), 16), "GROUP": 4,
        "ONE": rows <= 4, "WINDOW": False, "SOFTCAP": False, "SINKS": False, "SIGN": 1, "WIDE": q == "fp32",
        "SPLIT": split,
    }  # fmt: skip
    return ahead(
        decode_kernel, arguments | options | tile, num_warps=warps, num_stages=stages, fp_fusion=True,
        tensor_cores=q != "fp32", wide_loads=True, architectures=(80,) if arch < 90 else (90, 100),
    )  # fmt: skip


_ALL_OPTIONS = {"WINDOW": True, "SOFTCAP": True, "SINKS": True, "sinks": "*fp32"}
AOT = [
    _ahead(arch, *shape, **options)
    for arch in (80, 90)
    for *shape, options in (
        ("bf16", "bf16", 128, 4, {}),
        ("fp16", "i8", 128, 4, {}),
        ("fp16", "i8", 128, 4, {"page": 16} | _ALL_OPTIONS),
        ("bf16", "bf16", 128, 4, {"page": 16}),
        ("fp16", "fp16", 64, 4, {}),
        ("bf16", "bf16", 256, 4, {}),
        ("bf16", "i8", 80, 24, {}),
        ("fp16", "fp16", 128, 2048, {}),
        ("fp16", "i8", 128, 2048, {"page": 16} | _ALL_OPTIONS),
        ("fp32", "fp32", 128, 4, {}),
        ("fp32", "i8", 256, 2048, {"page": 16} | _ALL_OPTIONS),
    )
] + [
    ahead(
        merge_kernel,
        {
            "parts": "*fp32", "tops": "*fp32", "lengths": "*i32", "sinks": "*fp32", "out": "*bf16",
            "out_batch": "i32:16", "out_head": "i32:16", "out_row": "i32:16", "kv_heads": "i32",
            "queries": "i32", "capacity": "i32", "chunk_count": "i32", "window": "i32", "D": 128,
            "WIDTH": 128, "GROUP": 4, "WINDOW": True, "SINKS": True,
        },
        fp_fusion=True,
    )
]  # fmt: skip
