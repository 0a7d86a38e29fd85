"""quantize against torch: python bench/bench_quantize.py [--threads N] [--quick] [--json PATH]"""

from __future__ import annotations

import torch

from bench_norm import quantised
from harness import finish, floor_of, measure, options, timed_row

ops = torch.ops.narrowcast


def main() -> None:
    chosen, rows = options(__doc__), []
    for dtype in (torch.float32, torch.bfloat16):
        for m, k in ((1, 576), (128, 384), (512, 1024), (4096, 4096)):
            x = torch.randn(m, k, dtype=dtype)
            kind = str(dtype).removeprefix("torch.")
            floor = floor_of(x.nbytes + x.numel())
            cases = {
                "per token": {
                    "ours": lambda x=x: ops.quantize_int8(x),
                    "torch": lambda x=x: quantised(x),
                },
                "groups of 64": {
                    "ours": lambda x=x: ops.quantize_int8(x, 64),
                    "torch": lambda x=x: quantised(x.unflatten(-1, (-1, 64))),
                },
                "static": {
                    "ours": lambda x=x: ops.quantize_int8_static(x, 0.05, 3, torch.uint8),
                    "torch": lambda x=x: (x / 0.05).round().add(3).clamp(0, 255).to(torch.uint8),
                },
            }
            if dtype == torch.float32:
                cases["static"]["quantize_per_tensor"] = lambda x=x: torch.quantize_per_tensor(
                    x, 0.05, 3, torch.quint8
                )
            for name, calls in cases.items():
                if name.startswith("groups") and k % 64:
                    continue
                timings = measure(calls, seconds=chosen.seconds)
                rows.append(timed_row("quantize", f"{name} {m}x{k}", timings, dtype=kind, floor=floor))
    finish(rows, chosen)


if __name__ == "__main__":
    main()
