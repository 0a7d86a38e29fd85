"""Dequantisation against torch: bytes read and written per second, beside a clone of the result.

python bench/bench_dequantize.py [--threads 1]
"""

from __future__ import annotations

import argparse

import torch

from harness import measure, row, write
from narrowcast.formats import GGUF_BLOCKS, from_gguf

ops = torch.ops.narrowcast
ELEMENTS = 1 << 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = torch.randn(ELEMENTS)
    rows = []
    for type, (elements, size) in GGUF_BLOCKS.items():
        blocks = torch.randint(0, 60, (1024, ELEMENTS // 1024 // elements * size), dtype=torch.uint8)
        calls = {
            "ours": lambda b=blocks, t=type: ops.dequantize_gguf(b, t),
            "clone of the result": lambda: result.clone(),
        }
        seconds = measure(calls, rounds=7)
        ours = seconds.pop("ours") * 1e3
        peers = {name: s * 1e3 for name, s in seconds.items()}
        rows.append(row("dequantize", f"gguf {type} 16M elements", ours, peers, unit="ms"))
    weight = from_gguf(torch.randint(0, 60, (1024, 1024 * 16 // 32 * 20), dtype=torch.uint8), "Q4_1")
    q, scale = torch.randint(-127, 128, (4096, 4096), dtype=torch.int8), torch.rand(4096)
    for name, call, peer in (
        ("groups int4 g32", lambda: weight.dequantize(), None),
        (
            "int8 per row",
            lambda: ops.dequantize_int8(q, scale),
            lambda: q.float().mul_(scale[:, None]),
        ),
    ):
        calls = {"ours": call, "clone of the result": lambda: result.clone()}
        if peer:
            calls["torch"] = peer
        seconds = measure(calls, rounds=7)
        ours = seconds.pop("ours") * 1e3
        peers = {peer_name: s * 1e3 for peer_name, s in seconds.items()}
        rows.append(row("dequantize", f"{name} 16M elements", ours, peers, unit="ms"))
    print(write(rows, f"dequantize_{arguments.threads}"))


if __name__ == "__main__":
    main()
