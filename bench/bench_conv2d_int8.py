"""conv2d_int8 against torch's operators, over the layers of EfficientNet-Lite0 and some of ResNet-50.

    python bench/bench_conv2d_int8.py [--threads 1] [--quick] [--batch 1 16]

Ours is the step that a plan runs, uint8 in and out; onednn.qconv2d_pointwise does the same job with its
weights packed before, F.conv2d in float32 and bfloat16 works in channels-last. The limit: bytes / read
bandwidth, or multiply-adds at the peak of linear_int8. The last rows are sums over the network.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
import torch.nn.functional as F

from conv_layers import RESNET50, as_step, efficientnet_lite0
from harness import floor_of, int8_peak, measure, row, write

ops = torch.ops.narrowcast
CL = torch.channels_last


def operands(layer, batch):
    x_q = torch.randint(0, 256, (batch, layer.channels, layer.size, layer.size), dtype=torch.uint8)
    w_q = torch.randint(
        -127,
        128,
        (layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel),
        dtype=torch.int8,
    )
    w_scale = torch.rand(layer.outputs) * 0.01 + 0.001
    return x_q.to(memory_format=CL), w_q, w_scale, torch.randn(layer.outputs)


def calls_of(layer, batch, float_peers=True):
    x_q, w_q, w_scale, bias = operands(layer, batch)
    step, pad, padding = [layer.stride] * 2, layer.kernel // 2, [layer.kernel // 2] * 2
    x_scale, zero, out_scale = 0.02, 7, 0.05
    ours, result = as_step(
        ops.conv2d_int8,
        x_q,
        {"w_q": w_q, "w_scale": w_scale, "bias": bias},
        {"x_scale": x_scale, "x_zero_point": zero, "stride": step, "padding": padding,
         "groups": layer.groups, "activation": layer.activation, "out_scale": out_scale,
         "out_zero_point": 3},
    )  # fmt: skip
    zeros = torch.zeros(layer.outputs, dtype=torch.int32)
    packed = torch.ops.onednn.qconv_prepack(
        w_q, w_scale, x_scale, zero, step, padding, [1, 1], layer.groups, list(x_q.shape)
    )
    clamp = [0.0, 6.0] if layer.activation == "relu6" else []
    name = {"relu6": "hardtanh"}.get(layer.activation, layer.activation)

    def onednn():
        return torch.ops.onednn.qconv2d_pointwise(
            x_q, x_scale, zero, packed, w_scale, zeros, bias, step, padding, [1, 1], layer.groups,
            out_scale, 3, torch.uint8, name, clamp, "",
        )  # fmt: skip

    far = (onednn().int() - result.int()).abs().max().item()
    assert far <= 1, f"{layer}: codes differ by {far}"
    calls = {"ours": ours, "onednn qconv": onednn}
    for dtype in (torch.float32, torch.bfloat16) if float_peers else ():
        x, w = x_q.to(dtype), w_q.to(dtype).to(memory_format=CL)
        b = bias.to(dtype)
        key = f"conv2d {str(dtype).split('.')[1]}"
        calls[key] = lambda x=x, w=w, b=b: F.conv2d(x, w, b, step, pad, 1, layer.groups)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--quick", action="store_true", help="less time, int8 peer only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for batch in options.batch:
        totals: Counter[str] = Counter()
        network = efficientnet_lite0()
        for layer in [*network, *RESNET50]:
            calls = calls_of(layer, batch, not options.quick)
            seconds = measure(calls, seconds=0.15 if options.quick else 0.5, rounds=9)
            peers = {name: round(s * 1e6, 2) for name, s in seconds.items()}
            for name in peers:
                totals[name] += peers[name] * network[layer]
            floor = floor_of(layer.bytes(batch, 1), 2 * layer.macs(batch), int8_peak(options.threads)) * 1e6
            ours = peers.pop("ours")
            rows.append(row("conv2d_int8", f"b{batch} {layer}", ours, peers, floor=floor, dtype="uint8"))
        peers = {name: totals[name] for name in calls if name != "ours"}
        rows.append(
            row("conv2d_int8", f"b{batch} EfficientNet-Lite0, all", totals["ours"], peers, dtype="uint8")
        )
    if not options.quick:
        print(write(rows, f"conv2d_int8_t{options.threads}"))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
