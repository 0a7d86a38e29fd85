"""norm against torch: python bench/bench_norm.py [--threads N] [--quick] [--json PATH]"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from harness import finish, floor_of, measure, options, timed_row

ops = torch.ops.narrowcast
EPS = 1e-5


def quantised(y: torch.Tensor) -> torch.Tensor:
    """The symmetric quantiser as torch users write it."""
    scale = y.abs().amax(-1, keepdim=True) / 127
    return (y / scale).round().clamp(-127, 127).to(torch.int8)


def cases(x, residual, w, b):
    k = (x.shape[-1],)
    return {
        "rms_norm": (2, lambda: ops.rms_norm(x, w, EPS), lambda: F.rms_norm(x, k, w, EPS)),
        "layer_norm": (
            2,
            lambda: ops.layer_norm(x, w, b, EPS),
            lambda: F.layer_norm(x, k, w, b, EPS),
        ),
        "add_rms_norm": (
            4,
            lambda: ops.add_rms_norm(x, residual, w, EPS),
            lambda: F.rms_norm(x + residual, k, w, EPS),
        ),
        "add_layer_norm": (
            4,
            lambda: ops.add_layer_norm(x, residual, w, b, EPS),
            lambda: F.layer_norm(x + residual, k, w, b, EPS),
        ),
        "rms_norm_int8": (
            1.25,
            lambda: ops.rms_norm_int8(x, w, EPS),
            lambda: quantised(F.rms_norm(x, k, w, EPS)),
        ),
        "add_layer_norm_int8": (
            3.25,
            lambda: ops.add_layer_norm_int8(x, residual, w, b, EPS),
            lambda: quantised(F.layer_norm(x + residual, k, w, b, EPS)),
        ),
    }


def main() -> None:
    chosen, rows = options(__doc__), []
    for dtype in (torch.float32, torch.bfloat16):
        for m, k in ((1, 576), (1, 4096), (128, 384), (512, 1024), (4096, 4096)):
            x, residual = torch.randn(m, k, dtype=dtype), torch.randn(m, k, dtype=dtype)
            w, b = torch.randn(k, dtype=dtype), torch.randn(k, dtype=dtype)
            for name, (passes, ours, peer) in cases(x, residual, w, b).items():
                timings = measure({"ours": ours, "torch": peer}, seconds=chosen.seconds)
                kind = str(dtype).removeprefix("torch.")
                floor = floor_of(passes * x.nbytes)
                rows.append(timed_row("norm", f"{name} {m}x{k}", timings, dtype=kind, floor=floor))
    finish(rows, chosen)


if __name__ == "__main__":
    main()
