"""conv2d against F.conv2d in channels-last (oneDNN), over EfficientNet-Lite0 and some of ResNet-50.

    python bench/bench_conv2d.py [--threads 1] [--quick] [--batch 1 16] [--dtype float32]

Ours is the step that a plan runs; the peer gets its weights in channels-last and no activation. The limit:
bytes / read bandwidth, or operations at the peak of a large product. The last rows are sums over the network.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
import torch.nn.functional as F

from conv_layers import RESNET50, as_step, efficientnet_lite0
from harness import floor_of, measure, row, write

ops = torch.ops.narrowcast
CL = torch.channels_last


def calls_of(layer, batch, dtype):
    depth = layer.channels // layer.groups
    x = torch.randn(batch, layer.channels, layer.size, layer.size).to(dtype).to(memory_format=CL)
    weight = torch.randn(layer.outputs, depth, layer.kernel, layer.kernel) / (depth * layer.kernel**2) ** 0.5
    weight, bias = weight.to(dtype), torch.randn(layer.outputs).to(dtype)
    pad = layer.kernel // 2
    window = {"stride": [layer.stride] * 2, "padding": [pad] * 2, "groups": layer.groups}
    options = window | {"activation": layer.activation}
    ours, _ = as_step(ops.conv2d, x, {"weight": weight, "bias": bias}, options)
    w = weight.to(memory_format=CL)

    def torch_conv2d():
        return F.conv2d(x, w, bias, layer.stride, pad, 1, layer.groups)

    plain = ops.conv2d(x, weight, bias, **window)
    error = ((plain - torch_conv2d()).norm() / plain.norm()).item()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"{layer}: differs by {error}"
    return {"ours": ours, "F.conv2d": torch_conv2d}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quick", action="store_true", help="less time, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    rows = []
    for batch in options.batch:
        totals: Counter[str] = Counter()
        network = efficientnet_lite0()
        for layer in [*network, *RESNET50]:
            seconds = measure(calls_of(layer, batch, dtype), seconds=0.15 if options.quick else 0.5, rounds=9)
            peers = {name: round(s * 1e6, 2) for name, s in seconds.items()}
            for name in peers:
                totals[name] += peers[name] * network[layer]
            floor = floor_of(layer.bytes(batch, dtype.itemsize), 2 * layer.macs(batch)) * 1e6
            ours = peers.pop("ours")
            case = f"b{batch} {layer}"
            rows.append(row("conv2d", case, ours, peers, floor=floor, dtype=options.dtype))
        peers = {"F.conv2d": totals["F.conv2d"]}
        case = f"b{batch} EfficientNet-Lite0, all"
        rows.append(row("conv2d", case, totals["ours"], peers, dtype=options.dtype))
    if not options.quick:
        print(write(rows, f"conv2d_{options.dtype}_t{options.threads}"))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
