"""attention, attention_int8 and attention_decode against torch's scaled_dot_product_attention."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from harness import finish, measure, options, read_bandwidth, row

ops = torch.ops.narrowcast
WHOLE = [  # B, Hq, Hkv, S, D, causal
    (1, 12, 12, 32, 32, False),
    (8, 12, 12, 128, 32, False),
    (32, 12, 12, 256, 32, False),
    (1, 9, 3, 512, 64, True),
    (1, 32, 32, 2048, 128, True),
]
DECODE = [  # B, Hq, Hkv, keys, D
    (1, 9, 3, 64, 64),
    (1, 9, 3, 512, 64),
    (1, 9, 3, 2048, 64),
    (8, 9, 3, 512, 64),
    (4, 32, 8, 2048, 128),
    (1, 32, 32, 4096, 128),
]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def whole(
    seconds: float, dtype: torch.dtype, b: int, hq: int, hkv: int, s: int, d: int, causal: bool
) -> list[dict]:
    q, k, v = (torch.randn(b, h, s, d).to(dtype) for h in (hq, hkv, hkv))
    calls = {
        "attention": lambda: ops.attention(q, k, v, None, None, causal),
        "attention_int8": lambda: ops.attention_int8(q, k, v, None, None, causal),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=hq != hkv),
    }
    t = {n: x * 1e6 for n, x in measure(calls, seconds=seconds, rounds=5 if s > 1000 else 15).items()}
    case = f"B{b} H{hq}/{hkv} S{s} D{d}{' causal' if causal else ''}"
    exact = F.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), is_causal=causal, enable_gqa=hq != hkv
    )
    rows, sdpa = [], t.pop("sdpa")
    for name, ours in t.items():
        error = ((calls[name]().double() - exact).norm() / exact.norm()).item()
        peers = {"sdpa": sdpa} | {n: x for n, x in t.items() if n != name and name == "attention_int8"}
        rows.append(row(name, case, ours, peers, dtype=short(dtype), accuracy={"relative error": error}))
    return rows


def decode(
    seconds: float, cache: torch.dtype, bandwidth: float, b: int, hq: int, hkv: int, n: int, d: int
) -> dict:
    q, dense = torch.randn(b, hq, 1, d), torch.randn(b, hkv, n, d)
    lengths, scales = torch.full((b,), n, dtype=torch.int32), (None, None)
    k, v = dense.to(cache), dense.flip(2).to(cache)
    if cache == torch.int8:
        (k, k_scale), (v, v_scale) = ops.quantize_int8(dense), ops.quantize_int8(dense.flip(2))
        scales = (k_scale, v_scale)
    calls = {"ours": lambda: ops.attention_decode(q, k, v, lengths, *scales)}
    for peer in {torch.float32, torch.bfloat16 if cache == torch.int8 else cache}:
        operands = [t.to(peer) for t in (q, dense, dense.flip(2))]
        calls[f"sdpa {short(peer)}"] = functools.partial(
            F.scaled_dot_product_attention, *operands, enable_gqa=True
        )
    t = {name: x * 1e6 for name, x in measure(calls, seconds=seconds).items()}
    floor = 2 * k.numel() * k.element_size() / bandwidth * 1e6
    case = f"B{b} H{hq}/{hkv} keys {n} D{d}"
    return row("attention_decode", case, t.pop("ours"), t, floor=floor, dtype=short(cache))


if __name__ == "__main__":
    chosen = options(__doc__)
    bandwidth, rows = read_bandwidth(), []
    for dtype in (torch.float32, torch.bfloat16):
        rows += [r for case in WHOLE for r in whole(chosen.seconds, dtype, *case)]
    for cache in (torch.float32, torch.bfloat16, torch.int8):
        rows += [decode(chosen.seconds, cache, bandwidth, *case) for case in DECODE]
    finish(rows, chosen)
