"""linear_grouped against torch's own ways to do the same layer: int4 weight-only, and bf16.

    python bench/bench_linear_grouped.py [--threads 1] [--quick]

a8 and a16: activation_bits 8 and 16. The limit: packed bytes / read bandwidth, or multiply-adds / 64 (a16: 32,
as for bf16) per cycle of a core at --ghz, the larger. --cpu-time counts the seconds of this thread alone, for a
machine that others use.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional as F

from harness import measure, read_bandwidth, row, write
from narrowcast.formats import GroupedWeight
from narrowcast.nn_grouped import LinearGrouped

SHAPES = {  # SmolLM2-135M: N, K, bits
    "qkv": (960, 576, 4),
    "attention out": (576, 576, 4),
    "gate+up": (3072, 576, 4),
    "down": (576, 1536, 4),
    "head": (49152, 576, 8),
}


def case(name: str, m: int, bandwidth: float, macs_per_second: float, clock) -> list[dict]:
    n, k, bits = SHAPES[name]
    group = 32
    packed = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
    scale = (torch.rand(n, k // group) * 0.01).half()
    offset = (torch.randn(n, k // group) * 0.01).half() if bits == 4 else None
    weight = GroupedWeight(bits, group, packed, scale, offset)
    layers = {b: LinearGrouped(weight, activation_bits=b) for b in (8, 16)}
    x, dense = torch.randn(m, k).bfloat16(), weight.dequantize(torch.bfloat16)
    calls = {
        "8": lambda: layers[8](x),
        "16": lambda: layers[16](x),
        "bf16 linear": lambda: F.linear(x, dense),
    }
    if bits == 4:
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale_zero = torch.randn(k // group, n, 2).bfloat16()
        calls["_weight_int4pack_mm"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, tiles, group, scale_zero
        )
    else:
        q, row_scale = weight.codes(), torch.rand(n).bfloat16()
        calls["_weight_int8pack_mm"] = lambda: torch.ops.aten._weight_int8pack_mm(x, q, row_scale)
    seconds = measure(calls, rounds=20 if m <= 32 else 7, clock=clock)
    ours = {b: seconds.pop(b) * 1e6 for b in ("8", "16")}
    peers = {name: s * 1e6 for name, s in seconds.items()}
    memory, products = layers[8]._cpu_panels().nbytes / bandwidth, m * n * k / macs_per_second
    text = f"{name} M={m} N={n} K={k} int{bits} g{group}"
    return [
        row(
            "linear_grouped", f"{text} a{b}", ours[b], peers, floor=max(memory, products * int(b) / 8) * 1e6,
            dtype="bfloat16",
        )
        for b in ("8", "16")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ghz", type=float, default=3.3, help="clock for the limit of int8 products")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="with one thread only")
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time sees one thread")
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    bandwidth, macs = read_bandwidth(), 64e9 * arguments.ghz * arguments.threads
    print(f"reads {bandwidth / 1e9:.1f} GB/s, {arguments.threads} threads")
    rows = []
    with torch.inference_mode():
        for m in (1, 32) if arguments.quick else (1, 4, 8, 16, 32, 128, 512):
            for name in SHAPES:
                if name != "head" or m == 1:
                    rows += case(name, m, bandwidth, macs, clock)
    print(write(rows, f"linear_grouped_{arguments.threads}"))


if __name__ == "__main__":
    main()
