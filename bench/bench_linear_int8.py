"""linear_dynamic_int8 against torch's own int8 layers, float32 in and out, weights packed by both.

    python bench/bench_linear_int8.py [--threads 1] [--quick]

The limit: packed bytes / read bandwidth, or multiply-adds / 64 per cycle of a core at --ghz, the larger.
"""

from __future__ import annotations

import argparse
import warnings

import torch

from harness import measure, read_bandwidth, row, write
from narrowcast.nn import LinearInt8

SHAPES = [
    (384, 384), (1152, 384), (1536, 384), (384, 1536), (576, 576), (960, 576), (3072, 576),
    (576, 1536), (49152, 576), (4096, 4096),
]  # fmt: skip
ROWS = [1, 4, 16, 32, 128, 512, 1024]


def peers_of(weight, weight_scale, bias, x) -> dict:
    """quantize + onednn.qlinear (one scale for all tokens), and quantized.linear_dynamic."""
    n = weight.shape[0]
    blocked = torch.ops.onednn.qlinear_prepack(weight, list(x.shape))
    zeros = torch.zeros(n, dtype=torch.int32)
    scale = float(x.abs().max() / 127)

    def qlinear():
        x_q = torch.quantize_per_tensor(x, scale, 128, torch.quint8).int_repr()
        return torch.ops.onednn.qlinear_pointwise(
            x_q, scale, 128, blocked, weight_scale, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )

    calls = {"quantize + qlinear": qlinear}
    quantized = torch._make_per_channel_quantized_tensor(
        weight, weight_scale.double(), torch.zeros(n, dtype=torch.long), 0
    )
    for engine in ("x86", "onednn"):
        torch.backends.quantized.engine = engine
        layer = torch.ops.quantized.linear_prepack(quantized, bias)
        calls[f"linear_dynamic {engine}"] = lambda layer=layer: torch.ops.quantized.linear_dynamic(x, layer)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ghz", type=float, default=3.7)
    parser.add_argument("--quick", action="store_true", help="four shapes, four row counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
    bandwidth, peak = read_bandwidth(), 64e9 * options.ghz * options.threads
    rows = []
    for n, k in SHAPES[::3] if options.quick else SHAPES:
        layer = LinearInt8.from_float(torch.nn.Linear(k, n))
        for m in ROWS[::2] if options.quick else ROWS:
            x = torch.randn(m, k)
            calls = {"ours": lambda layer=layer, x=x: layer(x)}
            calls |= peers_of(layer.weight, layer.weight_scale, layer.bias, x)
            seconds = measure(calls, rounds=15 if m * n * k < 1e9 else 3)
            peers = {name: s * 1e6 for name, s in seconds.items()}
            ours = peers.pop("ours")
            floor = max(layer._cpu_panels().nbytes / bandwidth, m * n * k / peak) * 1e6
            rows.append(row("linear_int8", f"M={m} N={n} K={k} W8A8", ours, peers, floor=floor))
    print(write(rows, f"linear_int8_t{options.threads}"))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
