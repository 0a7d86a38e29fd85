"""kv_append in Triton: one program for a few rows (token, head) of k and v; formulas: kv_append.h.

Bound by memory: one read of k and v, one write into the caches. Bit-equal to the CPU: products and sums are
not fused, an INT8 row is rounded as the quantize room does it. What start and block_table hold is not checked
on a GPU, where reading it would make the host wait: a token whose slot, page or position does not exist is
left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import FLOATING, describe, fail, name, require, require_device
from ..common.triton_util import ahead, codes, inverse_of, is_finite, launch, next_power_of_2, scale_of
from ..quantize import findings_of


@triton.jit
def _put(x, cache, scale, findings, at, scale_at, inside, rows):
    """Rows of float32 into their slots; INT8: with a scale each, and NaN counted."""
    if cache.dtype.element_ty == tl.int8:
        odd = inside & (is_finite(x) == 0)
        if tl.max(tl.ravel(odd.to(tl.int32)), 0) > 0:
            tl.atomic_add(findings, tl.sum(tl.ravel((inside & (x != x)).to(tl.int64)), 0))
            tl.atomic_add(findings + 1, tl.sum(tl.ravel(odd.to(tl.int64)), 0))
        s = scale_of(tl.max(tl.abs(tl.where(is_finite(x), x, 0.0)), 1), 127.0)
        tl.store(scale + scale_at, s, mask=rows)
        x = codes(x * inverse_of(s)[:, None], 0, -127, 127)
    tl.store(cache + at, x.to(cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "heads", "length", "capacity", "pages", "table_width", "table_rows"])
def append_kernel(
    k, v, k_cache, v_cache, k_scale, v_scale, cos, sin, start, table, findings,
    k_batch, k_head, k_token, v_batch, v_head, v_token, kc_outer, kc_head, kc_slot, vc_outer, vc_head,
    vc_slot, ks_outer, ks_head, ks_slot, vs_outer, vs_head, vs_slot,
    rows, heads, length, capacity, pages, table_width, table_rows,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """HALF: pairs of k that turn; -1 without tables."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s, head, b = row % length, row // length % heads, row // length // heads
    good = row < rows
    position = tl.load(start + b, mask=good, other=0).to(tl.int64) + s
    good = good & (position >= 0) & (position < capacity)
    if HALF >= 0:
        good = good & (position < table_rows)
    outer, slot = b, position
    if PAGE > 0:
        outer = tl.load(table + b * table_width + position // PAGE, mask=good, other=0).to(tl.int64)
        good = good & (outer >= 0) & (outer < pages)
        slot = position % PAGE
    d = tl.arange(0, WIDTH)
    inside = good[:, None] & (d < D)[None, :]
    source = k + (b * k_batch + head * k_head + s * k_token)[:, None]
    x = tl.load(source + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if HALF > 0:
        turned = inside & (d < 2 * HALF)[None, :]
        if INTERLEAVED:
            pair, second, partner = d // 2, d % 2 == 1, d ^ 1
        else:
            pair, second = d % HALF, d >= HALF
            partner = tl.where(second, d - HALF, d + HALF)
        other = tl.load(source + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        angle = position[:, None] * HALF + pair[None, :]
        c = tl.load(cos + angle, mask=turned, other=1.0)
        part = other * tl.load(sin + angle, mask=turned, other=0.0)
        x = tl.where(turned, x * c + tl.where(second[None, :], part, -part), x)
    at = (outer * kc_outer + head * kc_head + slot * kc_slot)[:, None] + d[None, :]
    _put(x, k_cache, k_scale, findings, at, outer * ks_outer + head * ks_head + slot * ks_slot, inside, good)
    source = v + (b * v_batch + head * v_head + s * v_token)[:, None]
    x = tl.load(source + d[None, :], mask=inside, other=0.0).to(tl.float32)
    at = (outer * vc_outer + head * vc_head + slot * vc_slot)[:, None] + d[None, :]
    _put(x, v_cache, v_scale, findings, at, outer * vs_outer + head * vs_head + slot * vs_slot, inside, good)


def _rows_adjacent(t: Tensor) -> bool:
    return t.numel() == 0 or t.shape[-1] == 1 or t.stride(-1) == 1


def _expanded(t: Tensor) -> bool:
    """A tensor that is written must hold every element once, as far as strides of 0 tell."""
    return any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))


def _overlap(x: Tensor, y: Tensor) -> bool:
    if x.numel() == 0 or y.numel() == 0:
        return False
    (a, a_end), (b, b_end) = (
        (
            t.data_ptr(),
            t.data_ptr()
            + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size(),
        )
        for t in (x, y)
    )
    return a < b_end and b < a_end


def _check_caches(op: str, caches: dict[str, Tensor], k: Tensor, v: Tensor, paged: bool) -> None:
    k_cache, v_cache = caches.values()
    form = "[P, Hkv, page, D]" if paged else "[B, Hkv, C, D]"
    fits = k_cache.dtype in (*FLOATING, torch.int8) and k_cache.dim() == 4
    fits = fits and k_cache.shape[1::2] == k.shape[1::2] and (paged or k_cache.shape[0] == k.shape[0])
    if not fits:
        fail(
            op,
            f"k_cache must be float32, float16, bfloat16 or int8 {form} for k {list(k.shape)}, "
            f"got {describe(k_cache)}",
        )
    if v_cache.dtype != k_cache.dtype or v_cache.shape != k_cache.shape:
        fail(
            op,
            f"v_cache must have the dtype and shape of k_cache, {describe(k_cache)}, got {describe(v_cache)}",
        )
    for argument, t in caches.items():
        require_device(op, argument, t, k.device)
        require(
            _rows_adjacent(t) and not _expanded(t),
            op,
            f"{argument} must have stride 1 in the last dimension and not be expanded",
        )
    require(not _overlap(k_cache, v_cache), op, "v_cache must not overlap k_cache")
    for argument, t in (("k", k), ("v", v)):
        require(
            not _overlap(t, k_cache) and not _overlap(t, v_cache), op, f"{argument} must not overlap a cache"
        )


def _check_scales(op: str, scales: dict[str, Tensor | None], cache: Tensor, others: tuple) -> None:
    if cache.dtype != torch.int8:
        if any(t is not None for t in scales.values()):
            fail(op, f"k_scale and v_scale must be absent for {name(cache.dtype)} caches")
        return
    for argument, t in scales.items():
        if t is None or t.dtype != torch.float32 or t.shape != cache.shape[:3] or _expanded(t):
            fail(
                op,
                f"{argument} must be float32 of the shape of its int8 cache without D, {list(cache.shape)}, "
                f"and not expanded, got {describe(t)}",
            )
        require_device(op, argument, t, cache.device)
        require(not any(_overlap(t, x) for x in others), op, f"{argument} must not overlap another tensor")
    require(not _overlap(*scales.values()), op, "v_scale must not overlap k_scale")


def _tables(op: str, cos: Tensor | None, sin: Tensor | None, depth: int, device) -> tuple:
    if cos is None and sin is None:
        return None, None
    if cos is None or cos.dtype != torch.float32 or cos.dim() != 2 or 2 * cos.shape[1] > depth:
        fail(
            op,
            f"cos must be contiguous float32 [positions, R / 2] with R <= D = {depth}, got {describe(cos)}",
        )
    if sin is None or sin.dtype != torch.float32 or sin.shape != cos.shape:
        fail(
            op,
            f"sin must be contiguous float32 of the shape of cos, {list(cos.shape)}, got {describe(sin)}",
        )
    for argument, t in (("cos", cos), ("sin", sin)):
        require_device(op, argument, t, device)
    return cos.contiguous(), sin.contiguous()


def kv_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, start: Tensor, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    interleaved: bool = False, block_table: Tensor | None = None, k_shift: Tensor | None = None,
) -> None:  # fmt: skip
    op, paged = "kv_append", block_table is not None
    if k_shift is not None:  # belongs to caches of 4-bit codes, which LIMITS leaves to the reference
        fail(op, f"k_shift must be absent for {name(k_cache.dtype)} caches")
    if k.dtype not in FLOATING or k.dim() != 4:
        fail(op, f"k must be float32, float16 or bfloat16 [B, Hkv, S, D], got {describe(k)}")
    if v.dtype != k.dtype or v.shape != k.shape:
        fail(op, f"v must have the dtype and shape of k, {describe(k)}, got {describe(v)}")
    require_device(op, "v", v, k.device)
    _check_caches(op, {"k_cache": k_cache, "v_cache": v_cache}, k, v, paged)
    _check_scales(op, {"k_scale": k_scale, "v_scale": v_scale}, k_cache, (k_cache, v_cache, k, v))
    batch, heads, length, depth = k.shape
    if start.dtype != torch.int32 or start.shape != (batch,):
        fail(op, f"start must be contiguous int32 [{batch}], got {describe(start)}")
    require_device(op, "start", start, k.device)
    cos, sin = _tables(op, cos, sin, depth, k.device)
    capacity, width = k_cache.shape[2], 0
    if paged:
        if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != batch:
            fail(op, f"block_table must be contiguous int32 [B, pages], got {describe(block_table)}")
        require_device(op, "block_table", block_table, k.device)
        block_table = block_table.contiguous()
        width = block_table.shape[1]
        capacity *= width
    rows = batch * heads * length
    if rows == 0:
        return
    require(depth <= 8192, op, f"k must have a head size of at most 8192 on a GPU, got {depth}")
    k, v = (t if _rows_adjacent(t) else t.contiguous() for t in (k, v))
    block = max(next_power_of_2(depth), 16)
    per_program = max(1, min(16, 1024 // block))
    int8, none = k_cache.dtype == torch.int8, (0, 0, 0)
    with findings_of(op, k.device) as findings:
        launch(
            append_kernel, (triton.cdiv(rows, per_program),),
            k, v, k_cache, v_cache, k_scale, v_scale, cos, sin, start.contiguous(), block_table, findings,
            *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
            *(k_scale.stride() if int8 else none), *(v_scale.stride() if int8 else none),
            rows, heads, length, capacity, k_cache.shape[0], width, 0 if cos is None else cos.shape[0],
            on=k, D=depth, HALF=-1 if cos is None else cos.shape[1], INTERLEAVED=interleaved,
            PAGE=k_cache.shape[2] if paged else 0, ROWS=per_program, WIDTH=block,
        )  # fmt: skip


def _ahead(x: str, cache: str, half: int, interleaved: bool, page: int):
    names = append_kernel.arg_names
    arguments = dict.fromkeys(names[names.index("k_batch") : names.index("rows")], "i32:16")
    arguments |= dict.fromkeys(names[names.index("rows") : names.index("D")], "i32")
    arguments |= {"k": f"*{x}", "v": f"*{x}", "k_cache": f"*{cache}", "v_cache": f"*{cache}"}
    arguments |= dict.fromkeys(("k_scale", "v_scale"), "*fp32" if cache == "i8" else None)
    arguments |= dict.fromkeys(("cos", "sin"), "*fp32" if half > 0 else None)
    arguments |= {"start": "*i32", "table": "*i32" if page else None, "findings": "*i64"}
    arguments |= {"D": 128, "HALF": half, "INTERLEAVED": interleaved, "PAGE": page, "ROWS": 8, "WIDTH": 128}
    return ahead(append_kernel, arguments, wide_loads=True)


AOT = [
    _ahead("bf16", "bf16", 64, False, 0),
    _ahead("fp16", "i8", 64, False, 16),
    _ahead("fp16", "i8", 32, True, 0),
    _ahead("fp32", "fp16", -1, False, 16),
]
