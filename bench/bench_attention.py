"""attention and attention_decode against torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from harness import measure, read_bandwidth, row, write

ops = torch.ops.narrowcast
WHOLE = [  # B, Hq, Hkv, S, D, causal
    (1, 12, 12, 32, 32, False),
    (8, 12, 12, 128, 32, False),
    (32, 12, 12, 256, 32, False),
    (1, 9, 3, 512, 64, True),
    (1, 32, 32, 2048, 128, True),
]
DECODE = [(1, 9, 3, 512, 64), (4, 32, 8, 2048, 128)]  # B, Hq, Hkv, keys, D


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def whole(dtype: torch.dtype, b: int, hq: int, hkv: int, s: int, d: int, causal: bool) -> dict:
    q, k, v = (torch.randn(b, h, s, d).to(dtype) for h in (hq, hkv, hkv))
    calls = {
        "ours": lambda: ops.attention(q, k, v, None, None, causal),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=hq != hkv),
    }
    t = {n: x * 1e6 for n, x in measure(calls, rounds=5 if s > 1000 else 15).items()}
    case = f"B{b} H{hq}/{hkv} S{s} D{d}{' causal' if causal else ''}"
    return row("attention", case, t.pop("ours"), t, dtype=short(dtype))


def decode(cache: torch.dtype, bandwidth: float, b: int, hq: int, hkv: int, n: int, d: int) -> dict:
    peer = torch.float32 if cache == torch.float32 else torch.bfloat16
    q, dense = torch.randn(b, hq, 1, d), torch.randn(b, hkv, n, d)
    lengths, scales = torch.full((b,), n, dtype=torch.int32), (None, None)
    k, v = dense.to(cache), dense.flip(2).to(cache)
    if cache == torch.int8:
        (k, k_scale), (v, v_scale) = ops.quantize_int8(dense), ops.quantize_int8(dense.flip(2))
        scales = (k_scale, v_scale)
    pq, pk, pv = (t.to(peer) for t in (q, dense, dense.flip(2)))
    calls = {
        "ours": lambda: ops.attention_decode(q, k, v, lengths, *scales),
        f"sdpa {short(peer)}": lambda: F.scaled_dot_product_attention(pq, pk, pv, enable_gqa=True),
    }
    t = {name: x * 1e6 for name, x in measure(calls, rounds=15).items()}
    floor = 2 * k.numel() * k.element_size() / bandwidth * 1e6
    case = f"B{b} H{hq}/{hkv} keys {n} D{d}"
    return row("attention_decode", case, t.pop("ours"), t, floor=floor, dtype=short(cache))


if __name__ == "__main__":
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bandwidth = read_bandwidth()
        for dtype in (torch.float32, torch.bfloat16):
            rows += [whole(dtype, *case) for case in WHOLE]
        for cache in (torch.float32, torch.bfloat16, torch.int8):
            rows += [decode(cache, bandwidth, *case) for case in DECODE]
    print(write(rows, "attention"))
