"""rope against torch: python bench/bench_rope.py [--threads N] [--quick] [--json PATH]"""

from __future__ import annotations

import torch

from harness import finish, floor_of, measure, options, timed_row

ops = torch.ops.narrowcast


def torch_rope(x, cos, sin):
    """The half-split form as model code writes it; cos and sin [S, D] hold each angle twice."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def main() -> None:
    chosen, rows = options(__doc__), []
    for dtype in (torch.float32, torch.bfloat16):
        for b, h, s, d in ((1, 9, 1, 64), (1, 9, 128, 64), (1, 32, 512, 128)):
            x = torch.randn(b, s, h, d, dtype=dtype).transpose(1, 2)
            angle = torch.rand(s, d // 2)
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            wide = [torch.cat((t, t), -1) for t in (cos, sin)]
            calls = {
                "ours": lambda x=x, c=cos, s=sin: ops.rope(x, c, s),
                "torch": lambda x=x, w=wide: torch_rope(x, *w),
            }
            timings = measure(calls, seconds=chosen.seconds)
            kind, floor = str(dtype).removeprefix("torch."), floor_of(2 * x.nbytes)
            rows.append(timed_row("rope", f"{b}x{h}x{s}x{d}", timings, dtype=kind, floor=floor))
    finish(rows, chosen)


if __name__ == "__main__":
    main()
