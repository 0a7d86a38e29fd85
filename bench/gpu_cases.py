"""What bench_gpu.py times: ops at the shapes of models, with the bytes and operations that each must spend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import gpu_peers as peers
from conv_layers import RESNET50, Layer, efficientnet_lite0
from gpu_harness import Draw
from narrowcast.formats import GGUF_BLOCKS

ops = torch.ops.narrowcast
Inputs = dict[str, Any]
BF16 = torch.bfloat16
ROWS_CHECKED = 16


def same(result: Any) -> Tensor:
    return result


@dataclass(frozen=True)
class Case:
    """make(draw) -> inputs; ours(**inputs) -> what value() takes to a tensor; exact(inputs) -> part(value), in float64.

    moved: each input read once and each result written once, bytes. operations: by kind, see Floors.
    limit: ||ours - exact|| / ||exact|| at most.
    """

    room: str
    op: str
    name: str
    dtype: str
    make: Callable[[Draw], Inputs]
    ours: Callable[..., Any]
    exact: Callable[[Inputs], Tensor]
    moved: float
    operations: Mapping[str, float] = field(default_factory=dict)
    peers: Sequence[peers.Peer] = ()
    part: Callable[[Tensor], Tensor] = lambda y: y[:ROWS_CHECKED]
    value: Callable[[Any], Tensor] = same
    limit: float = 0.01


# linear: m rows of x, weight [n, k]

LLAMA = [(4096, 4096), (14336, 4096)]  # n, k of a model of 8 billion parameters
FEW_AND_MANY = (1, 16, 512, 4096)
CUBE = (8192, 8192, 8192)
SHAPES = [(m, n, k) for m in FEW_AND_MANY for n, k in LLAMA]


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x[:ROWS_CHECKED].double() @ weight.double().t()


def linear(m: int, n: int, k: int) -> Case:
    return Case(
        "linear", "linear", f"M={m} N={n} K={k}", "bfloat16",
        lambda d: {"x": d.normal(m, k), "w": d.normal(n, k, std=k**-0.5)},
        lambda x, w: ops.linear(x, w),
        lambda i: product(i["x"], i["w"]),
        2 * (m * k + n * k + m * n), {"bf16": 2 * m * n * k}, peers.LINEAR,
    )  # fmt: skip


def int8_weights(d: Draw, n: int, k: int) -> Inputs:
    return {"w_q": d.codes(n, k), "w_scale": d.uniform(n) / (73 * k**0.5)}


def linear_int8(m: int, n: int, k: int) -> Case:
    return Case(
        "linear_int8", "linear_int8", f"M={m} N={n} K={k} W8A8", "int8",
        lambda d: {"x_q": d.codes(m, k), "x_scale": d.uniform(m) / 73, **int8_weights(d, n, k)},
        lambda x_q, x_scale, w_q, w_scale: ops.linear_int8(
            x_q, x_scale, w_q, w_scale, None, "none", None, BF16
        ),
        lambda i: product(
            i["x_q"].double() * i["x_scale"][:, None], i["w_q"].double() * i["w_scale"][:, None]
        ),
        m * k + n * k + 2 * m * n + 4 * (m + n), {"int8": 2 * m * n * k}, peers.INT8,
    )  # fmt: skip


def linear_dynamic_int8(m: int, n: int, k: int) -> Case:
    return Case(
        "linear_int8", "linear_dynamic_int8", f"M={m} N={n} K={k} W8A8, x bfloat16", "bfloat16",
        lambda d: {"x": d.normal(m, k), **int8_weights(d, n, k)},
        lambda x, w_q, w_scale: ops.linear_dynamic_int8(x, w_q, w_scale),
        lambda i: product(i["x"], i["w_q"].double() * i["w_scale"][:, None]),
        2 * m * k + n * k + 2 * m * n + 4 * n, {"int8": 2 * m * n * k}, peers.DYNAMIC_INT8, limit=0.03,
    )  # fmt: skip


def int4_weights(d: Draw, n: int, k: int, group: int) -> Inputs:
    packed = d.codes(n, k // 2, low=0, high=255, dtype=torch.uint8)
    return {"packed": packed, "scale": (d.uniform(n, k // group) / (4.6 * k**0.5)).half()}


def linear_grouped(m: int, n: int, k: int, group: int = 128) -> Case:
    return Case(
        "linear_grouped", "linear_grouped", f"M={m} N={n} K={k} W4A16 g{group}", "int4",
        lambda d: {"x": d.normal(m, k), **int4_weights(d, n, k, group)},
        lambda x, packed, scale: ops.linear_grouped(x, packed, scale, None, group, 4),
        lambda i: product(i["x"], peers.int4_weight(i)),
        2 * m * k + n * k / 2 + 2 * n * k / group + 2 * m * n, {"bf16": 2 * m * n * k}, peers.INT4,
    )  # fmt: skip


# attention: q [b, hq, s, d], k and v [b, hkv, s, d]

WHOLE = [
    (b, h, kv, s, d, causal)
    for h, kv, d in ((32, 8, 128), (16, 16, 64))
    for s, b in ((8192, 1), (2048, 4))
    for causal in (True, False)
]
DECODE = [(1, 32, 8, 2048, 128), (1, 32, 8, 8192, 128), (32, 32, 8, 2048, 128), (8, 32, 8, 8192, 128)]


def last_queries(y: Tensor) -> Tensor:
    return y[:1, :2, -64:]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """last_queries of the result, in float64."""
    keys, repeat = k.shape[2], q.shape[1] // k.shape[1]
    few = last_queries(q).double()
    k, v = (t[:1].repeat_interleave(repeat, 1)[:, :2].double() for t in (k, v))
    scores = few @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if causal:
        seen = torch.arange(keys - few.shape[2], keys, device=q.device)[:, None]
        scores = scores.masked_fill(torch.arange(keys, device=q.device) > seen, -torch.inf)
    return scores.softmax(-1) @ v


def attention(b: int, hq: int, hkv: int, s: int, d: int, causal: bool, int8: bool = False) -> Case:
    work = 4 * b * hq * s * s * d * (0.5 if causal else 1.0)
    op = "attention_int8" if int8 else "attention"
    call = getattr(ops, op)
    return Case(
        op, op, f"B{b} H{hq}/{hkv} S{s} D{d}{' causal' if causal else ''}", "bfloat16",
        lambda draw: {"q": draw.normal(b, hq, s, d), **{n: draw.normal(b, hkv, s, d) for n in ("k", "v")}},
        lambda q, k, v: call(q, k, v, None, None, causal),
        lambda i: softmax_attention(i["q"], i["k"], i["v"], causal),
        4 * b * s * d * (hq + hkv), {"int8": work / 2, "bf16": work / 2} if int8 else {"bf16": work},
        [*peers.sdpas(causal), peers.sage(causal), peers.all_integer(causal)] if int8 else peers.sdpas(causal),
        part=last_queries, limit=0.05 if int8 else 0.02,
    )  # fmt: skip


def attention_decode(b: int, hq: int, hkv: int, n: int, d: int, int8: bool = False) -> Case:
    def make(draw: Draw) -> Inputs:
        inputs = {"q": draw.normal(b, hq, 1, d)}
        for name in ("k", "v"):
            cache = (b, hkv, n, d)
            inputs[f"{name}_cache"] = draw.codes(*cache) if int8 else draw.normal(*cache)
            if int8:
                inputs[f"{name}_scale"] = draw.uniform(b, hkv, n) / 73
        inputs["lengths"] = torch.full((b,), n, dtype=torch.int32, device=draw.device)
        return inputs

    def exact(i: Inputs) -> Tensor:
        k, v = i["k_cache"].double(), i["v_cache"].double()
        if int8:
            k, v = k * i["k_scale"][..., None], v * i["v_scale"][..., None]
        return softmax_attention(i["q"], k, v, False)

    cache_bytes = 2 * b * hkv * n * (d + 4 if int8 else 2 * d)
    return Case(
        "attention_decode", "attention_decode", f"B{b} H{hq}/{hkv} keys {n} D{d}",
        "int8" if int8 else "bfloat16", make, ops.attention_decode, exact, cache_bytes + 4 * b * hq * d,
        {"bf16": 4 * b * hq * n * d}, peers.sdpas(False), part=last_queries, limit=0.02,
    )  # fmt: skip


# element by element; what is exact here is what the CPU's kernels, which the tests hold against float64, make of it


def on_cpu(call: Callable[..., Any], i: Inputs, *cut: str) -> Any:
    few = {n: v[:ROWS_CHECKED] if n in cut else v for n, v in i.items()}
    return call(**{n: v.cpu() if isinstance(v, Tensor) else v for n, v in few.items()})


def dequantize(kind: str, n: int, k: int) -> Case:
    if kind == "int8":
        op, call = "dequantize_int8", lambda q, scale: ops.dequantize_int8(q, scale, None, 0, BF16)
        make = lambda d: {"q": d.codes(n, k), "scale": d.uniform(n)}  # noqa: E731
        stored, cut, others = n * k + 4 * n, ("q", "scale"), [peers.Peer("torch", peers.scaled_codes)]
    elif kind == "int4 g128":
        op = "dequantize_groups"
        call = lambda packed, scale: ops.dequantize_groups(packed, scale, None, 128, 4, BF16)  # noqa: E731
        make = lambda d: int4_weights(d, n, k, 128)  # noqa: E731
        stored, cut = n * k / 2 + 2 * n * k / 128, ("packed", "scale")
        others = [peers.Peer("bitsandbytes nf4", peers.bitsandbytes_dequantize, "bitsandbytes")]
    else:
        op, call = "dequantize_gguf", lambda blocks: ops.dequantize_gguf(blocks, kind, BF16)
        elements, size = GGUF_BLOCKS[kind]
        row = k // elements * size  # bytes under 60: as float16, scales without infinities
        make = lambda d: {"blocks": d.codes(n, row, low=0, high=59, dtype=torch.uint8)}  # noqa: E731
        stored, cut, others = n * row, ("blocks",), []
    return Case(
        "dequantize", op, f"{kind} {n}x{k}", "bfloat16", make, call, lambda i: on_cpu(call, i, *cut).double(),
        stored + 2 * n * k, peers=others,
    )  # fmt: skip


def quantize(m: int, k: int) -> Case:
    return Case(
        "quantize", "quantize_int8", f"{m}x{k}", "bfloat16",
        lambda d: {"x": d.normal(m, k)}, ops.quantize_int8,
        lambda i: on_cpu(ops.quantize_int8, i, "x")[0].double(),
        3 * m * k + 4 * m, peers=[peers.Peer("torch", peers.rounded_rows)], value=lambda result: result[0],
    )  # fmt: skip


def norm(m: int, k: int) -> Case:
    call = functools.partial(ops.add_rms_norm, eps=1e-6)
    return Case(
        "norm", "add_rms_norm", f"{m}x{k}", "bfloat16",
        lambda d: {"x": d.normal(m, k), "residual": d.normal(m, k), "weight": d.normal(k)}, call,
        lambda i: on_cpu(call, i, "x", "residual")[0].double(), 8 * m * k + 2 * k,
        peers=[peers.Peer("torch", peers.summed_norm)], value=lambda result: result[0],
    )  # fmt: skip


# convolutions

BATCH = 32
RESNET = [layer for layer in RESNET50 if layer.channels > 3]
EFFICIENTNET = sorted(efficientnet_lite0(), key=lambda layer: -layer.macs(1))[::5]


def geometry(layer: Layer) -> Inputs:
    pad = layer.kernel // 2
    return {"stride": (layer.stride,) * 2, "padding": (pad, pad), "groups": layer.groups}


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def weight_shape(layer: Layer) -> tuple[int, int, int, int]:
    return layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel


def conv2d(layer: Layer, batch: int = BATCH) -> Case:
    fan = layer.channels // layer.groups * layer.kernel**2
    options = {**geometry(layer), "activation": layer.activation}
    call = lambda x, w, bias: ops.conv2d(x, w, bias, **options)  # noqa: E731
    return Case(
        "conv2d", "conv2d", f"B{batch} {layer}", "bfloat16",
        lambda d: {
            "x": channels_last(d.normal(batch, layer.channels, layer.size, layer.size)),
            "w": d.normal(*weight_shape(layer), std=fan**-0.5), "bias": d.normal(layer.outputs),
        },
        call,
        lambda i: on_cpu(lambda **o: call(**{n: t[:1] if n == "x" else t for n, t in o.items()}), i).double(),
        layer.bytes(batch, 2), {"bf16": 2 * layer.macs(batch)}, [peers.convolution(layer)],
        part=lambda y: y[:1],
    )  # fmt: skip


def conv2d_int8(layer: Layer, batch: int = BATCH) -> Case:
    fan = layer.channels // layer.groups * layer.kernel**2
    zero, step = (0, 0.03) if layer.activation != "none" else (128, 0.05)
    options = {**geometry(layer), "activation": layer.activation, "out_scale": step, "out_zero_point": zero}
    call = lambda x_q, w_q, w_scale, bias: ops.conv2d_int8(  # noqa: E731
        x_q, 0.02, 128, w_q, w_scale, bias, **options
    )
    value = lambda codes: (codes.float() - zero) * step  # noqa: E731
    shape = (batch, layer.channels, layer.size, layer.size)
    return Case(
        "conv2d_int8", "conv2d_int8", f"B{batch} {layer}", "uint8",
        lambda d: {
            "x_q": channels_last(d.codes(*shape, low=0, high=255, dtype=torch.uint8)),
            "w_q": d.codes(*weight_shape(layer)), "w_scale": d.uniform(layer.outputs) / (73 * fan**0.5),
            "bias": d.normal(layer.outputs, dtype=torch.float32),
        },
        call,
        lambda i: value(
            on_cpu(lambda **o: call(**{n: t[:1] if n == "x_q" else t for n, t in o.items()}), i)
        ).double(),
        layer.bytes(batch, 1), {"int8": 2 * layer.macs(batch)}, [peers.convolution(layer)],
        part=lambda y: y[:1], value=value, limit=0.02,
    )  # fmt: skip


KINDS = ("int8", "int4 g128", "Q4_0", "Q8_0", "Q4_K", "Q6_K")

#: Room -> its cases, most telling first: a run that is short of time leaves the last ones out.
CASES: dict[str, Callable[[], list[Case]]] = {
    "linear": lambda: [linear(*s) for s in (CUBE, *SHAPES)],
    "linear_int8": lambda: [case(*s) for s in (CUBE, *SHAPES) for case in (linear_int8, linear_dynamic_int8)],
    "linear_grouped": lambda: [linear_grouped(*s) for s in (*SHAPES, CUBE)],
    "attention": lambda: [attention(*s) for s in WHOLE],
    "attention_int8": lambda: [attention(*s, int8=True) for s in WHOLE],
    "attention_decode": lambda: [attention_decode(*s, int8=i) for s in DECODE for i in (False, True)],
    "dequantize": lambda: [dequantize(kind, 14336, 4096) for kind in KINDS],
    "quantize": lambda: [quantize(m, k) for m in (16, 4096) for k in (4096, 14336)],
    "norm": lambda: [norm(m, 4096) for m in (16, 512, 8192)],
    "conv2d": lambda: [conv2d(layer) for layer in (*RESNET, *EFFICIENTNET)],
    "conv2d_int8": lambda: [conv2d_int8(layer) for layer in (*RESNET, *EFFICIENTNET)],
}
