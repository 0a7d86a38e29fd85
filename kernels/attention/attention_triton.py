"""attention and attention_lse in Triton; the rule is attention.h's, the checks are attention_checks.py's.

One program: BLOCK_M rows of one K/V head. Row r is query r / GROUP of head kv_head * GROUP + r % GROUP,
so that the heads that share keys read them once. Scores live in the logarithm to base 2. A tile that
every row sees whole takes no mask.

A value that is not finite spoils the rows that see its key, in a tile with a mask all their columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import ahead, is_finite, launch, next_power_of_2
from .attention_checks import Attention, attention_arguments

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(float("-inf"))
#: Sizes that are not compiled in: neither a variant for multiples of 16, nor a constant where one is 1.
SIZES = ["batch", "kv_heads", "sq", "sk", "window"]


def widths(depth: int, least: int = 16) -> tuple[int, int]:
    """A head size as a power of two and a smaller one beside it (0: none): 80 is 64 + 16, not 128."""
    whole = max(next_power_of_2(depth), least)
    main = whole // 2
    tail = max(next_power_of_2(depth - main), least)
    return (main, tail) if least <= main and tail < main else (whole, 0)


@triton.jit
def tanh(x):
    far = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - far) / (1.0 + far)
    y = x * x
    near = x + x * y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def load(pointers, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile, 0 where the masks asked for are not set."""
    if ROWS and COLUMNS:
        return tl.load(pointers, mask=rows & columns, other=0.0)
    if ROWS:
        return tl.load(pointers, mask=rows, other=0.0)
    if COLUMNS:
        return tl.load(pointers, mask=columns, other=0.0)
    return tl.load(pointers)


@triton.jit
def place(
    cu_q, cu_k, batch, kv_heads, sq, sk,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, PACKED: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """What a program works on: sequence, K/V head, first row, first query and key, their numbers."""
    pid = tl.program_id(0)
    if PACKED:
        # Sequence b owns the blocks from cu_q[b] * GROUP // BLOCK_M + b on: room for its last, part block.
        blocks = (sq.to(tl.int64) * GROUP // BLOCK_M).to(tl.int32) + batch
        block, kv_head = pid % blocks, pid // blocks
        low, high = batch * 0, batch - 1
        while low < high:
            middle = (low + high + 1) // 2
            at = tl.minimum(tl.maximum(tl.load(cu_q + middle), 0), sq).to(tl.int64)
            below = at * GROUP // BLOCK_M + middle <= block
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle - 1)
        # Lengths are not known before the launch: what is out of range is cut off.
        q0 = tl.minimum(tl.maximum(tl.load(cu_q + low), 0), sq)
        q1 = tl.minimum(tl.maximum(tl.load(cu_q + low + 1), q0), sq)
        k0 = tl.minimum(tl.maximum(tl.load(cu_k + low), 0), sk)
        k1 = tl.minimum(tl.maximum(tl.load(cu_k + low + 1), k0), sk)
        row0 = (block - (q0.to(tl.int64) * GROUP // BLOCK_M).to(tl.int32) - low) * BLOCK_M
        return low, kv_head, row0, q0, k0, q1 - q0, k1 - k0
    blocks = tl.cdiv(sq * GROUP, BLOCK_M)
    block, rest = pid % blocks, pid // blocks
    if LAST_FIRST:  # causal: the longest rows start first
        block = blocks - 1 - block
    return rest // kv_heads, rest % kv_heads, block * BLOCK_M, sq * 0, sk * 0, sq, sk


@triton.jit
def key_span(first, last, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys seen from the positions first .. last: (begin, end), and (inner, outer) seen by all of them.

    begin, inner and outer are multiples of BLOCK_N.
    """
    begin, end = length * 0, length
    inner, outer = length * 0, length
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        inner = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
        if not CAUSAL:
            end = tl.minimum(length, last + window)
            outer = tl.minimum(length, first + window)
    if CAUSAL:
        end = tl.minimum(length, last + 1)
        outer = tl.minimum(length, first + 1)
    outer = tl.maximum(outer, 0) // BLOCK_N * BLOCK_N
    some = inner < outer
    return begin, tl.maximum(end, begin), tl.where(some, inner, begin), tl.where(some, outer, begin)


@triton.jit
def seen(positions, keys, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    visible = (keys < length)[None, :]
    if CAUSAL:
        visible = visible & (keys[None, :] <= positions[:, None])
    if WINDOW:
        visible = visible & (keys[None, :] > positions[:, None] - window)
        if not CAUSAL:
            visible = visible & (keys[None, :] < positions[:, None] + window)
    return visible


@triton.jit
def softmax_step(s, factor, row_factor, m, total):
    """The next tile of a running softmax: weights, the factor of older sums, maximum, denominator.

    The scores are s * factor: one number, or one per row as factor [M, 1] and row_factor [M].
    """
    top = tl.maximum(m, tl.max(s, 1) * row_factor)
    base = tl.where(top == NOTHING, 0.0, top)
    p = tl.exp2(s * factor - base[:, None])
    older = tl.exp2(m - base)
    return p, older, top, total * older + tl.sum(p, 1)


@triton.jit
def keep_apart(p, s, v):
    """Weights and values of a tile with a mask: NaN behind it must not reach a sum (0 * NaN is NaN).

    Values that are not finite become 0, and the weights NaN where a row sees their key.
    """
    wide = v.to(tl.float32)
    wild = is_finite(wide) == 0
    bad = tl.max(wild.to(tl.int32), 1) > 0
    p = tl.where((s != NOTHING) & bad[None, :], float("nan"), p)
    return p, tl.where(wild, 0.0, wide).to(v.dtype)


@triton.jit
def add_values(
    sums, sums_tail, p, s, older, v, start, inside, v_row, DV: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Older sums times their factor, plus the tile's weights p times its values; s: its scores, for GUARD."""
    dv, lane = tl.arange(0, V_MAIN), tl.arange(0, BLOCK_N)
    at = v + start.to(tl.int64) * v_row + lane[:, None] * v_row
    part = load(at + dv[None, :], inside[:, None], (dv < DV)[None, :], MASKED, V_MAIN > DV)
    weights = p
    if GUARD:
        weights, part = keep_apart(p, s, part)
    sums = tl.dot(weights.to(part.dtype), part, sums * older[:, None], input_precision="ieee")
    if V_TAIL > 0:
        dv_tail = V_MAIN + tl.arange(0, V_TAIL)
        part = load(
            at + dv_tail[None, :], inside[:, None], (dv_tail < DV)[None, :], MASKED, V_MAIN + V_TAIL > DV
        )
        weights = p
        if GUARD:
            weights, part = keep_apart(p, s, part)
        sums_tail = tl.dot(weights.to(part.dtype), part, sums_tail * older[:, None], input_precision="ieee")
    return sums, sums_tail


@triton.jit
def start_softmax(sinks, heads, SINKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Maximum and denominator before any key: nothing, or the sink of a row's head."""
    if SINKS:
        m = tl.load(sinks + heads) * LOG2E
        return m, tl.where(m == NOTHING, 0.0, 1.0)
    return tl.full([BLOCK_M], NOTHING, tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def store_rows(out, at, sums, total, valid, DEPTH: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """sums / total into columns FROM .. FROM + WIDTH of out; a row that saw nothing becomes 0."""
    result = sums * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    columns = FROM + tl.arange(0, WIDTH)
    mask = valid[:, None] & (columns < DEPTH)[None, :]
    tl.store(out + at[:, None] + columns[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tiles(
    sums, sums_tail, m, total, q, q_tail, k, v, bias, bias_rows, valid, positions, length, window,
    k_row, v_row, bias_key, scale, cap, begin, middle, resume, end,
    D: tl.constexpr, DV: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, GUARD: tl.constexpr,
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
        at = k + start.to(tl.int64) * k_row + lane[None, :] * k_row
        s = tl.dot(
            q,
            load(at + d[:, None], inside[None, :], (d < D)[:, None], MASKED, MAIN > D),
            input_precision="ieee",
        )
        if TAIL > 0:
            d_tail = MAIN + tl.arange(0, TAIL)
            part = load(at + d_tail[:, None], inside[None, :], (d_tail < D)[:, None], MASKED, MAIN + TAIL > D)
            s = tl.dot(q_tail, part, s, input_precision="ieee")
        factor = scale
        if SOFTCAP:
            s = cap * tanh(s * (scale / cap))
            factor = 1.0
        if BIAS:
            pointers = bias + bias_rows[:, None] + keys.to(tl.int64)[None, :] * bias_key
            added = tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
            s = s * factor + added * LOG2E
            factor = 1.0
        if MASKED:
            s = tl.where(seen(positions, keys, length, window, CAUSAL, WINDOW), s, NOTHING)
        p, older, m, total = softmax_step(s, factor, factor, m, total)
        sums, sums_tail = add_values(
            sums, sums_tail, p, s, older, v, start, inside, v_row, DV, V_MAIN, V_TAIL, BLOCK_N, MASKED, GUARD
        )
    return sums, sums_tail, m, total


@triton.jit(do_not_specialize=SIZES)
def attention_kernel(
    q, k, v, bias, sinks, cu_q, cu_k, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, lse_batch, lse_head, lse_row,
    bias_batch, bias_head, bias_query, bias_key,
    batch, kv_heads, sq, sk, scale, cap, window,
    D: tl.constexpr, DV: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, V_MAIN: tl.constexpr,
    V_TAIL: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr,
    LSE: tl.constexpr, SIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
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
    head64 = head.to(tl.int64)
    at = q + b * q_batch + (row * q_row + head64 * q_head)[:, None]
    d = tl.arange(0, MAIN)
    q_main = load(at + d[None, :], valid[:, None], (d < D)[None, :], True, MAIN > D)
    q_tail = q_main
    if TAIL > 0:
        d_tail = MAIN + tl.arange(0, TAIL)
        q_tail = load(at + d_tail[None, :], valid[:, None], (d_tail < D)[None, :], True, MAIN + TAIL > D)
    if SIGN != 1:  # scale is positive; the sign of the one asked for, or 0, is here
        q_main = (q_main * SIGN).to(q.dtype.element_ty)
        q_tail = (q_tail * SIGN).to(q.dtype.element_ty)
    k += b * k_batch + kv_head.to(tl.int64) * k_head + k0.to(tl.int64) * k_row
    v += b * v_batch + kv_head.to(tl.int64) * v_head + k0.to(tl.int64) * v_row
    bias_rows = b * bias_batch + head64 * bias_head + query.to(tl.int64) * bias_query
    first = row0 // GROUP + keys - queries
    last = (tl.minimum(row0 + BLOCK_M, rows) - 1) // GROUP + keys - queries
    begin, end, inner, outer = key_span(first, last, keys, window, CAUSAL, WINDOW, BLOCK_N)

    m, total = start_softmax(sinks, tl.where(valid, head, 0), SINKS, BLOCK_M)
    sums = tl.zeros([BLOCK_M, V_MAIN], tl.float32)
    sums_tail = tl.zeros([BLOCK_M, V_TAIL if V_TAIL > 0 else 16], tl.float32)
    sums, sums_tail, m, total = _tiles(
        sums, sums_tail, m, total, q_main, q_tail, k, v, bias, bias_rows, valid, positions, keys, window,
        k_row, v_row, bias_key, scale, cap, inner, outer, outer, outer,
        D, DV, MAIN, TAIL, V_MAIN, V_TAIL, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, BIAS, False, BIAS,
    )  # fmt: skip
    sums, sums_tail, m, total = _tiles(
        sums, sums_tail, m, total, q_main, q_tail, k, v, bias, bias_rows, valid, positions, keys, window,
        k_row, v_row, bias_key, scale, cap, begin, inner, outer, end,
        D, DV, MAIN, TAIL, V_MAIN, V_TAIL, EDGE_N, CAUSAL, WINDOW, SOFTCAP, BIAS, True, CAUSAL or WINDOW or BIAS,
    )  # fmt: skip
    at = b * out_batch + row * out_row + head64 * out_head
    store_rows(out, at, sums, total, valid, DV, 0, V_MAIN)
    if V_TAIL > 0:
        store_rows(out, at, sums_tail, total, valid, DV, V_MAIN, V_TAIL)
    if LSE:
        result = tl.where(total == 0.0, NOTHING, (m + tl.log2(total)) * LN2)
        tl.store(lse + b * lse_batch + row * lse_row + head64 * lse_head, result, mask=valid)


#: BLOCK_M, BLOCK_N, EDGE_N (the width of tiles with a mask, which need more registers), warps, stages;
#: for head sizes up to 64, 128 and 256. The widest that compile without spills (tools/gates.py triton).
_TILES = {
    "float32": ((32, 32, 32, 8, 2), (32, 32, 32, 8, 1), (16, 16, 16, 8, 1)),
    80: ((128, 64, 32, 8, 3), (64, 64, 32, 4, 2), (64, 32, 32, 8, 2)),
    90: ((128, 128, 64, 8, 3), (128, 64, 32, 8, 3), (128, 32, 16, 8, 2)),
}


def tiles_for(a: Attention, arch: int) -> dict:
    """The tile for a call: by its options, its own number of rows, never by the batch."""
    wide = max(a.depth, a.v_depth)
    table = "float32" if a.q.dtype == torch.float32 else 90 if arch >= 90 else 80
    m, n, edge, warps, stages = _TILES[table][(wide > 64) + (wide > 128)]
    if a.bias is not None:  # its addresses take many registers
        n = edge = min(edge, 32)
    rows = a.sq * a.group
    if a.cu_q is None and rows <= 64 and rows < m and table != "float32":
        m, n, edge, warps = max(16, next_power_of_2(rows)), min(n, 64), min(edge, 64), 4
    return {"BLOCK_M": m, "BLOCK_N": n, "EDGE_N": edge, "num_warps": warps, "num_stages": stages}


def constants(a: Attention, least: int = 16) -> dict:
    """The constexpr arguments that attention and attention_int8 share."""
    main, tail = widths(a.depth, least)
    v_main, v_tail = widths(a.v_depth)
    return {
        "D": a.depth, "DV": a.v_depth, "MAIN": main, "TAIL": tail, "V_MAIN": v_main, "V_TAIL": v_tail,
        "GROUP": a.group, "CAUSAL": a.causal, "WINDOW": a.window > 0, "SOFTCAP": a.softcap > 0,
        "BIAS": a.bias is not None, "SINKS": a.sinks is not None, "PACKED": a.cu_q is not None,
    }  # fmt: skip


def _run(a: Attention, out: Tensor, lse: Tensor | None) -> None:
    if out.shape[:-1].numel() == 0:
        return
    tile = tiles_for(a, arch_of(a.q))
    launch(
        attention_kernel, (blocks_of(a, tile["BLOCK_M"]) * a.kv_heads,),
        a.q, a.k, a.v, a.bias, a.sinks, a.cu_q, a.cu_k, out, lse,
        *a.strides(a.q), *a.strides(a.k), *a.strides(a.v), *a.strides(out),
        *((0, 0, 0) if lse is None else a.strides(lse)), *a.bias_strides(),
        a.batch, a.kv_heads, a.sq, a.sk, positive_scale(a.scale), a.softcap * LOG2E.value, a.window,
        on=a.q, **constants(a), LSE=lse is not None, SIGN=sign_of(a.scale), enable_fp_fusion=True, **tile,
    )  # fmt: skip


def blocks_of(a: Attention, block_m: int) -> int:
    """Of all sequences and one K/V head; packed sequences may end in a part block each."""
    if a.cu_q is not None:
        return a.sq * a.group // block_m + a.batch
    return a.batch * triton.cdiv(a.sq * a.group, block_m)


def positive_scale(scale: float) -> float:
    """What scores are multiplied by for the logarithm to base 2."""
    return abs(scale or 1.0) * LOG2E.value


def sign_of(scale: float) -> int:
    return 0 if scale == 0 else int(math.copysign(1, scale))


def arch_of(t: Tensor) -> int:
    """Compute capability, such as 90; what the interpreter runs is tiled for 80."""
    major, minor = torch.cuda.get_device_capability(t.device) if t.is_cuda else (8, 0)
    return major * 10 + minor


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None,
    causal: bool = False, window: int = 0, softcap: float = 0.0, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    a = attention_arguments(
        "attention", q, k, v, bias, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k, sinks
    )
    out = a.q.new_empty((*a.q.shape[:-1], a.v_depth))
    _run(a, out, None)
    return out


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None,
    causal: bool = False, window: int = 0, softcap: float = 0.0, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    a = attention_arguments(
        "attention_lse", q, k, v, bias, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k, sinks
    )
    out = a.q.new_empty((*a.q.shape[:-1], a.v_depth))
    lse = a.q.new_empty(a.q.shape[:-1], dtype=torch.float32)
    _run(a, out, lse)
    return out, lse


def shapes_ahead(dtype: str, depth: int, rows: int = 512, bias: bool = False) -> Attention:
    """What decides a tile, for what is compiled ahead of time."""
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    q = torch.empty((1, 4, rows, depth), dtype=types[dtype], device="meta")
    options = (1.0, 0.0, 0, True)
    return Attention(q, q, q, q if bias else None, None, None, None, 1, 4, 1, rows, rows, *options)


def _ahead(arch: int, dtype: str, depth: int, rows: int = 512, **options):
    a = shapes_ahead(dtype, depth, rows, "bias" in options)
    tile = tiles_for(a, arch)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    names = attention_kernel.arg_names
    arguments = dict.fromkeys(names[names.index("q_batch") : names.index("batch")], "i32:16")
    arguments |= dict.fromkeys(names[names.index("batch") : names.index("D")], "i32")
    arguments |= dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | {"scale": "fp32", "cap": "fp32"}
    arguments |= dict.fromkeys(("bias", "sinks", "cu_q", "cu_k", "lse"))
    return ahead(
        attention_kernel, arguments | constants(a) | {"LSE": False, "SIGN": 1} | tile | options,
        num_warps=warps, num_stages=stages, fp_fusion=True, tensor_cores=dtype != "fp32", wide_loads=True,
        architectures=(80,) if arch < 90 else (90, 100),
    )  # fmt: skip


_EVERYTHING = {
    "bias": "*fp16", "sinks": "*fp32", "lse": "*fp32", "WINDOW": True, "SOFTCAP": True, "SINKS": True,
    "LSE": True,
}  # fmt: skip
_PACKED = {"cu_q": "*i32", "cu_k": "*i32", "PACKED": True}
AOT = [
    _ahead(arch, dtype, depth, **options)
    for arch in (80, 90)
    for dtype, depth, options in (
        ("fp16", 64, {}),
        ("bf16", 128, _PACKED),
        ("bf16", 80, {}),
        ("fp16", 96, {}),
        ("fp16", 256, {}),
        ("fp16", 64, _EVERYTHING),
        ("fp16", 128, _EVERYTHING),
        ("bf16", 128, {"rows": 4}),
        ("fp32", 64, {}),
        ("fp32", 128, {}),
        ("fp32", 256, {}),
    )
]
