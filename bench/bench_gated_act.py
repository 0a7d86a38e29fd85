"""gated_act against torch: python bench/bench_gated_act.py [--threads N] [--quick] [--json PATH]"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench_norm import quantised
from harness import finish, floor_of, measure, options, timed_row

ops = torch.ops.narrowcast


def main() -> None:
    chosen, rows = options(__doc__), []
    for dtype in (torch.float32, torch.bfloat16):
        for m, k in ((1, 1536), (1, 14336), (128, 1536), (512, 4096)):
            gate, up = torch.randn(m, 2 * k, dtype=dtype).chunk(2, -1)
            cases = {
                "silu_mul": (3, lambda g=gate, u=up: ops.silu_mul(g, u), lambda g=gate, u=up: F.silu(g) * u),
                "gelu_mul": (3, lambda g=gate, u=up: ops.gelu_mul(g, u), lambda g=gate, u=up: F.gelu(g) * u),
                "silu_mul_int8": (
                    2.25,
                    lambda g=gate, u=up: ops.silu_mul_int8(g, u),
                    lambda g=gate, u=up: quantised(F.silu(g) * u),
                ),
            }
            for name, (passes, ours, peer) in cases.items():
                timings = measure({"ours": ours, "torch": peer}, seconds=chosen.seconds)
                kind, size = str(dtype).removeprefix("torch."), m * k * gate.element_size()
                floor = floor_of(passes * size)
                rows.append(timed_row("gated_act", f"{name} {m}x{k}", timings, dtype=kind, floor=floor))
    finish(rows, chosen)


if __name__ == "__main__":
    main()
