"""Attention over sequences and caches, and the cache itself."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.kernels.attention import attention_ref
from narrowcast.kernels.attention_decode import attention_decode_ref
from narrowcast.kernels.attention_int8 import attention_int8_ref
from narrowcast.kernels.kv_append import kv_append_ref

from .draw import FLOATS, Draw
from .linears import other
from .spec import Arguments, Expected, Op, bad_out, is_floating, overlap

INT8, INT32, FLOAT32 = torch.int8, torch.int32, torch.float32
BOUNDS = {torch.float32: 8e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
DEPTHS = (1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 64, 65, 80, 128)


def draw_options(draw: Draw, a: Arguments, heads: int) -> None:
    a["scale"] = draw.choice((0.1, 1.0, -0.5)) if draw.chance(0.3) else None
    a["window"] = draw.randint(1, 40) if draw.chance(0.3) else 0
    a["softcap"] = draw.choice((5.0, 30.0)) if draw.chance(0.2) else 0.0
    a["sinks"] = draw.tensor([heads], FLOAT32) if draw.chance(0.2) else None


def option_faults(a: Arguments, heads: int) -> set[str]:
    found = set()
    if a["scale"] is not None and not abs(a["scale"]) < 1e30:
        found.add("scale")
    if a["softcap"] != 0 and not 1e-30 <= a["softcap"] <= 1e30:
        found.add("softcap")
    if a["window"] < 0:
        found.add("window")
    if a["sinks"] is not None and (a["sinks"].dtype != FLOAT32 or a["sinks"].shape != (heads,)):
        found.add("sinks")
    return found


def bounds_of(draw: Draw, total: int, batch: int) -> Tensor:
    cuts = sorted(draw.randint(0, total) for _ in range(batch - 1))
    t = draw.empty([batch + 1], INT32, "contiguous")
    t.copy_(torch.tensor([0, *cuts, total], dtype=INT32))
    return t


def draw_attention(draw: Draw) -> Arguments:
    batch, kv_heads = draw.size(3), draw.choice((1, 2, 3))
    heads, d = kv_heads * draw.choice((1, 1, 2, 4)), draw.choice(DEPTHS)
    dv = d if draw.chance(0.8) else draw.choice(DEPTHS)
    sq, sk, dtype = draw.size(33), draw.size(67), draw.floating()
    packed = draw.chance(0.25)
    form = (lambda h, s, n: [s, h, n]) if packed else (lambda h, s, n: [batch, h, s, n])
    a: Arguments = {
        "q": draw.tensor(form(heads, sq, d), dtype),
        "k": draw.tensor(form(kv_heads, sk, d), dtype),
        "v": draw.tensor(form(kv_heads, sk, dv), dtype),
        "bias": None,
        "causal": draw.chance(0.4),
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
    }
    draw_options(draw, a, heads)
    if packed:
        a["cu_seqlens_q"] = bounds_of(draw, sq, max(batch, 1))
        a["cu_seqlens_k"] = bounds_of(draw, sk, max(batch, 1))
    elif draw.chance(0.3):
        sizes = [n if draw.chance(0.7) else 1 for n in (batch, heads, sq, sk)]
        a["bias"] = draw.tensor(sizes[draw.choice((0, 0, 1, 2)) :], draw.floating())
    return a


def attention_faults(a: Arguments) -> set[str]:
    q, k, v, cu_q, cu_k = (a[n] for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
    packed = cu_q is not None or cu_k is not None
    rank, row = (3, 0) if packed else (4, 2)
    pair = {"cu_seqlens_q", "cu_seqlens_k"} if packed and (cu_q is None or cu_k is None) else set()
    found = {n for n in "qkv" if not is_floating(a[n]) or a[n].dim() != rank}
    if found:
        return found | pair
    if k.dtype != q.dtype or k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        found.add("k")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % kv_heads if kv_heads else heads:
        found.add("k")
    if v.dtype != q.dtype or v.shape[:-1] != k.shape[:-1]:
        found.add("v")
    found |= pair | option_faults(a, heads)
    if packed and not pair:
        for name, cu, total in (("cu_seqlens_q", cu_q, q.shape[0]), ("cu_seqlens_k", cu_k, k.shape[0])):
            if (
                cu.dtype != INT32
                or cu.dim() != 1
                or cu.numel() < 1
                or cu.shape != cu_q.shape
                or cu[0] != 0
                or cu[-1] != total
                or bool((cu.diff() < 0).any())
            ):
                found.add(name)
    if a["bias"] is not None:
        bias, wanted = a["bias"], [q.shape[0], heads, q.shape[row], k.shape[row]]
        tail = wanted[4 - bias.dim() :] if bias.dim() <= 4 else []
        fits = bias.dim() <= 4 and all(n in (1, m) for n, m in zip(bias.shape, tail))
        if packed or not is_floating(bias) or not fits:
            found.add("bias")
    return found


def attention_op(form: str) -> Op:
    """form: "attention", "attention.out", "attention_lse" or "attention_int8"."""
    name, _, overload = form.partition(".")

    def draw_all(draw: Draw) -> Arguments:
        a = draw_attention(draw)
        if overload:
            a["out"] = draw.out([*a["q"].shape[:-1], a["v"].shape[-1]], a["q"].dtype)
        return a

    def faults(a: Arguments) -> set[str]:
        found = attention_faults(a)
        if overload and not found:
            q, inputs = a["q"], [v for n, v in a.items() if isinstance(v, Tensor) and n != "out"]
            if bad_out(a["out"], [*q.shape[:-1], a["v"].shape[-1]], (q.dtype,), *inputs):
                found.add("out")
        return found

    def reference(a: Arguments) -> list[Expected]:
        q, v = a["q"], a["v"]
        inputs = {n: t for n, t in a.items() if n != "out"}
        shape = (*q.shape[:-1], v.shape[-1])
        finite = all(
            bool(t.isfinite().all()) for t in a.values() if isinstance(t, Tensor) and t is not a.get("out")
        )
        if 0 in shape or q.shape[-1] == 0 or 0 in a["k"].shape:
            rows = [Expected(torch.zeros(shape), q.dtype, check_values=False)]
            lse = [Expected(torch.zeros(shape[:-1]), FLOAT32, check_values=False)]
            return rows + (lse if name == "attention_lse" else [])
        # Rounding of a score moves a probability by that much.
        steep = 1 + score_size(a) * 0.05
        bound = BOUNDS[q.dtype] * steep
        if name == "attention_int8":
            y = attention_int8_ref.attention_int8(**inputs)
            return [Expected(y, q.dtype, False, other(v), max(bound, 1e-2), check_values=finite)]
        y, lse = attention_ref.attention_lse(**inputs)
        rows = Expected(y, q.dtype, False, other(v), bound, check_values=finite)
        if name == "attention":
            return [rows]
        return [rows, Expected(lse, FLOAT32, False, 1 + score_size(a), 4e-6 * steep, check_values=finite)]

    return Op(
        name, draw_all, faults, reference, kernels=name if name == "attention_int8" else "attention",
        overload=overload or "default", written=("out",) if overload else (),
    )  # fmt: skip


def score_size(a: Arguments) -> float:
    q, k = a["q"], a.get("k", a.get("k_cache"))
    scale = q.shape[-1] ** -0.5 if a["scale"] is None else abs(a["scale"])
    largest = q.double().abs().nan_to_num(0, 0, 0).amax() * k.double().abs().nan_to_num(0, 0, 0).amax()
    return largest.item() * scale * q.shape[-1] ** 0.5


# caches


def draw_cache(draw: Draw, new: str, lengths: str) -> Arguments:
    batch, kv_heads, s = draw.size(3), draw.choice((1, 2, 3)), draw.choice((0, 1, 1, 1, 2, 3, 7))
    d = draw.choice(DEPTHS)
    heads = kv_heads * draw.choice((1, 2, 4)) if new == "q" else kv_heads
    cache_dtype = draw.choice((*FLOATS, INT8))
    a: Arguments = {}
    if draw.chance(0.4):
        page, pages = draw.choice((1, 3, 8, 16)), draw.randint(1, 5)
        total = max(1, batch * pages) + draw.randint(0, 3)
        order = draw.sample(range(total), batch * pages)
        table = draw.empty([batch, pages], INT32, "contiguous")
        table.copy_(torch.tensor(order, dtype=INT32).view(batch, pages))
        a["block_table"], sizes, capacity = table, [total, kv_heads, page, d], page * pages
    else:
        capacity = draw.size(67, 0.0) + s
        a["block_table"], sizes = None, [batch, kv_heads, capacity, d]
    s = min(s, capacity)
    layout = draw.choice(("contiguous", "rows"))
    scales = [draw.tensor(sizes[:3], FLOAT32, positive=True, layout="contiguous") for _ in range(2)]
    a["k_cache"] = draw.tensor(sizes, cache_dtype, layout=layout)
    a["v_cache"] = draw.tensor(sizes, cache_dtype, layout=layout)
    a["k_scale"], a["v_scale"] = scales if cache_dtype == INT8 else (None, None)
    a[new] = draw.tensor([batch, heads, s, d], draw.floating())
    low, high = (s, capacity) if lengths == "lengths" else (0, capacity - s)
    a[lengths] = draw.tensor([batch], INT32, low=low, high=high)
    return a


def cache_faults(a: Arguments, new: str, lengths: str) -> set[str]:
    x, k, v, table = a[new], a["k_cache"], a["v_cache"], a["block_table"]
    found = set() if is_floating(x) and x.dim() == 4 else {new}
    if k.dtype not in (*FLOATS, INT8) or k.dim() != 4:
        found.add("k_cache")
    if x.dim() == k.dim() == 4 and k.shape[3] != x.shape[3]:
        found.add("k_cache")
    if x.dim() == k.dim() == 4 and table is None and k.shape[0] != x.shape[0]:
        found.add("k_cache")
    if v.dtype != k.dtype or v.shape != k.shape:
        found.add("v_cache")
    if found:
        return found
    for name in ("k_scale", "v_scale"):
        scale = a[name]
        if (scale is None) == (k.dtype == INT8):
            found |= {"k_scale", "v_scale"}
        elif scale is not None and (scale.dtype != FLOAT32 or scale.shape != k.shape[:3]):
            found.add(name)
    capacity = k.shape[2]
    if table is not None:
        if table.dtype != INT32 or table.dim() != 2 or table.shape[0] != x.shape[0]:
            return found | {"block_table", lengths}
        capacity *= table.shape[1]
    if a[lengths].dtype != INT32 or a[lengths].shape != (x.shape[0],):
        return found | {lengths}
    s = x.shape[2]
    low, high = (s, capacity) if lengths == "lengths" else (0, capacity - s)
    if bool(((a[lengths] < low) | (a[lengths] > high)).any()):
        found.add(lengths)
        if table is not None and bool(((table < 0) | (table >= k.shape[0])).any()):
            found.add("block_table")  # either may be met first
    return found


def pages_fault(a: Arguments, first: Tensor, last: Tensor) -> bool:
    """Whether the table names a page that does not exist among those of the slots first .. last - 1."""
    table, page = a["block_table"], a["k_cache"].shape[2]
    if table is None or page == 0:
        return False
    for row, low, high in zip(table.tolist(), first.tolist(), last.tolist()):
        used = row[low // page : (high + page - 1) // page] if high > low else []
        if any(not 0 <= p < a["k_cache"].shape[0] for p in used):
            return True
    return False


def decode_op(out: bool) -> Op:
    def draw_decode(draw: Draw) -> Arguments:
        a = draw_cache(draw, "q", "lengths")
        draw_options(draw, a, a["q"].shape[1])
        if out:
            a["out"] = draw.out(a["q"].shape, a["q"].dtype)
        return a

    def faults(a: Arguments) -> set[str]:
        found = cache_faults(a, "q", "lengths")
        q, k = a["q"], a["k_cache"]
        if q.dim() == 4:
            found |= option_faults(a, q.shape[1])
            if k.dim() == 4 and (q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]):
                found.add("k_cache")
        if not found and pages_fault(a, torch.zeros_like(a["lengths"]), a["lengths"]):
            found.add("block_table")
        inputs = [v for n, v in a.items() if isinstance(v, Tensor) and n != "out"]
        if out and not found and bad_out(a["out"], q.shape, (q.dtype,), *inputs):
            found.add("out")
        return found

    def reference(a: Arguments) -> list[Expected]:
        q, v = a["q"], a["v_cache"]
        inputs = {n: t for n, t in a.items() if n != "out"}
        if 0 in q.shape or 0 in a["k_cache"].shape:
            return [Expected(torch.zeros(q.shape), q.dtype, check_values=False)]
        size = score_size(a) * (3 if a["k_scale"] is None else max(a["k_scale"].abs().max().item(), 1))
        bound = BOUNDS[q.dtype] * (1 + 0.05 * size)
        values = other(v) * (1 if a["v_scale"] is None else other(a["v_scale"]) + 0.01)
        finite = all(bool(t.isfinite().all()) for n, t in inputs.items() if isinstance(t, Tensor))
        y = attention_decode_ref.attention_decode(**inputs)
        return [Expected(y, q.dtype, False, values, bound, check_values=finite)]

    return Op(
        "attention_decode", draw_decode, faults, reference, kernels="attention_decode",
        overload="out" if out else "default", written=("out",) if out else (),
    )  # fmt: skip


def draw_append(draw: Draw) -> Arguments:
    a = draw_cache(draw, "k", "start")
    k = a["k"]
    a["v"] = draw.tensor(k.shape, k.dtype)
    a["cos"] = a["sin"] = None
    if draw.chance(0.4):
        table = a["block_table"]
        capacity = a["k_cache"].shape[2] * (1 if table is None else table.shape[1])
        sizes = [capacity + draw.randint(0, 3), k.shape[3] // 2]
        a["cos"], a["sin"] = draw.tensor(sizes, FLOAT32), draw.tensor(sizes, FLOAT32)
    a["interleaved"] = draw.chance(0.5)
    return a


def append_faults(a: Arguments) -> set[str]:
    k, v, cache, cos, sin = a["k"], a["v"], a["k_cache"], a["cos"], a["sin"]
    found = cache_faults(a, "k", "start")
    if v.dtype != k.dtype or v.shape != k.shape:
        found.add("v")
    if k.dim() == cache.dim() == 4 and k.shape[1] != cache.shape[1]:
        found.add("k_cache")
    written = [a[n] for n in ("k_cache", "v_cache", "k_scale", "v_scale") if a[n] is not None]
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        t = a[name]
        if t is None:
            continue
        if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride())):
            found.add(name)
        if name.endswith("cache") and t.numel() and t.dim() and t.shape[-1] != 1 and t.stride(-1) != 1:
            found.add(name)
        if any(t is not o and overlap(t, o) for o in written):
            found.add(name)
    if cos is not None or sin is not None:
        for name, t in (("cos", cos), ("sin", sin)):
            if (
                t is None
                or t.dtype != FLOAT32
                or t.dim() != 2
                or (k.dim() == 4 and 2 * t.shape[1] > k.shape[3])
            ):
                found.add(name)
            elif cos is not None and t.shape != cos.shape:
                found.add("sin")
        if not found and k.numel() and int(a["start"].max()) + k.shape[2] > cos.shape[0]:
            found |= {"cos", "start"}
    if not found and pages_fault(a, a["start"], a["start"] + k.shape[2]):
        found.add("block_table")
    return found


def expect_append(a: Arguments) -> list[Expected]:
    written = [n for n in ("k_cache", "k_scale", "v_cache", "v_scale") if a[n] is not None]
    order = [written.index(n) for n in ("k_cache", "v_cache", "k_scale", "v_scale") if n in written]
    if a["k"].numel() == 0:
        new = [a[n] for n in written]
    else:
        new = list(kv_append_ref.kv_append(**a))
    finite = all(bool(a[n].isfinite().all()) for n in ("k", "v"))
    results = []
    for i in order:
        t = new[i]
        int8, turned = t.dtype == INT8, written[i][0] == "k" and a["cos"] is not None
        kind = Expected(
            t, t.dtype, exact=int8 or not turned, codes=int(turned), check_values=finite or not turned
        )
        if not int8 and turned:
            kind.bound = BOUNDS[t.dtype]
        results.append(kind)
    return results


OPS = [
    attention_op("attention"),
    attention_op("attention.out"),
    attention_op("attention_lse"),
    attention_op("attention_int8"),
    decode_op(False),
    decode_op(True),
    Op(
        "kv_append",
        draw_append,
        append_faults,
        expect_append,
        written=("k_cache", "v_cache", "k_scale", "v_scale"),
    ),
]
