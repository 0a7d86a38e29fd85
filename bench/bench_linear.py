"""linear against torch.nn.functional.linear with the same bias and activation, in three dtypes.

    python bench/bench_linear.py [--threads 1] [--quick]

The limit: packed bytes / read bandwidth, or multiply-adds / 16 per cycle (bfloat16: 32) of a core at
--ghz, the larger.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from harness import measure, read_bandwidth, row, write

SHAPES = [
    (384, 384), (1152, 384), (1536, 384), (384, 1536), (576, 576), (960, 576), (3072, 576),
    (576, 1536), (49152, 576), (4096, 4096),
]  # fmt: skip
ROWS = [1, 4, 16, 32, 128, 512, 1024]
_ops = torch.ops.narrowcast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ghz", type=float, default=3.7)
    parser.add_argument("--quick", action="store_true", help="four shapes, four row counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bandwidth, peak = read_bandwidth(), 16e9 * options.ghz * options.threads
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rate = peak * (2 if dtype == torch.bfloat16 else 1)
        for n, k in SHAPES[::3] if options.quick else SHAPES:
            weight, bias = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)
            packed = _ops._linear_pack(weight)
            for m in ROWS[::2] if options.quick else ROWS:
                x = torch.randn(m, k).to(dtype)
                calls = {
                    "packed": lambda x=x, w=packed, n=n, b=bias: _ops._linear_packed(x, w, n, b, "gelu"),
                    "canonical": lambda x=x, w=weight, b=bias: _ops.linear(x, w, b, "gelu"),
                    "F.linear + F.gelu": lambda x=x, w=weight, b=bias: F.gelu(F.linear(x, w, b)),
                }
                seconds = measure(calls, rounds=15 if m * n * k < 3e8 else 3)
                times = {name: s * 1e6 for name, s in seconds.items()}
                peers = {"F.linear + F.gelu": times.pop("F.linear + F.gelu")}
                floor = max(packed.nbytes / bandwidth, m * n * k / rate) * 1e6
                kind, case = str(dtype).removeprefix("torch."), f"M={m} N={n} K={k} gelu"
                for name, ours in times.items():
                    text = f"{case} {kind} {name} weights"
                    rows.append(row("linear", text, ours, peers, floor=floor, dtype=kind))
    print(write(rows, f"linear_t{options.threads}"))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
