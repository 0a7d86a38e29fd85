"""Other kernels of a GPU at the same job: those of torch, and of packages that happen to be installed.

A peer's ``build(inputs)`` does once what its users do once (packing, rounding the weight) and returns the call that is
timed. What is not installed is named as absent, what raises as refused; neither stops the others.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from narrowcast.formats import unpack_int4

Inputs = Mapping[str, Any]
PACKAGES = ("torchao", "bitsandbytes", "gemlite", "sageattention")


@dataclass(frozen=True)
class Peer:
    """compared: its result is in the units of ours. package: what it needs besides torch."""

    name: str
    build: Callable[[Inputs], Callable[[], Any]]
    package: str | None = None
    compared: bool = True


def absent() -> dict[str, str]:
    return {name: "not installed" for name in PACKAGES if importlib.util.find_spec(name) is None}


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def int8_weight(i: Inputs) -> Tensor:
    return (i["w_q"].float() * i["w_scale"].reshape(-1, *[1] * (i["w_q"].dim() - 1))).bfloat16()


def int4_weight(i: Inputs) -> Tensor:
    codes = unpack_int4(i["packed"]).float() - 8
    n, groups = i["scale"].shape
    return (codes.reshape(n, groups, -1) * i["scale"].float()[..., None]).reshape(n, -1).bfloat16()


def layer_of(weight: Tensor, config: Any) -> torch.nn.Module:
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential(layer)
    quantize_(model, config)
    return model


# linear


def bf16_linear(weight: Callable[[Inputs], Tensor]) -> Peer:
    def build(i: Inputs):
        w, x = weight(i), i["x"] if "x" in i else (i["x_q"].float() * i["x_scale"][:, None]).bfloat16()
        return lambda: F.linear(x, w)

    return Peer("torch linear bf16", build)


def int_mm(i: Inputs):
    return lambda: torch._int_mm(i["x_q"], i["w_q"].t())


def int_mm_scaled(i: Inputs):
    scale = i["w_scale"]
    return lambda: (
        torch._int_mm(i["x_q"], i["w_q"].t()).float().mul_(i["x_scale"][:, None]).mul_(scale).bfloat16()
    )


def bitsandbytes_int8(i: Inputs):
    from bitsandbytes import functional

    return lambda: functional.int8_linear_matmul(i["x_q"], i["w_q"])


def torchao_int8(i: Inputs):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    layer = layer_of(int8_weight(i), Int8DynamicActivationInt8WeightConfig())
    return lambda: layer(i["x"])


def gemlite_int8(i: Inputs):
    from gemlite.helper import A8W8_int8_dynamic

    weight = int8_weight(i)
    layer = A8W8_int8_dynamic(device=str(weight.device), dtype=weight.dtype).from_weights(weight)
    return lambda: layer(i["x"])


def tinygemm(i: Inputs):
    codes = unpack_int4(i["packed"])
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    scale = i["scale"].bfloat16()
    scales = torch.stack((scale, torch.zeros_like(scale)), dim=-1).transpose(0, 1).contiguous()
    group = codes.shape[1] // scale.shape[1]
    return lambda: torch._weight_int4pack_mm(i["x"], packed, group, scales)


def torchao_int4(i: Inputs):
    from torchao.quantization import Int4WeightOnlyConfig

    layer = layer_of(int4_weight(i), Int4WeightOnlyConfig(group_size=128))
    return lambda: layer(i["x"])


def bitsandbytes_nf4(i: Inputs):
    import bitsandbytes

    weight = int4_weight(i)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=128, quant_type="nf4")
    return lambda: bitsandbytes.matmul_4bit(i["x"], codes.t(), state)


def gemlite_int4(i: Inputs):
    from gemlite.helper import A16Wn

    codes, scale = unpack_int4(i["packed"]), i["scale"].bfloat16()
    n, k = codes.shape
    maker = A16Wn(device=str(codes.device), dtype=torch.bfloat16)
    flat = scale.reshape(-1, 1)
    layer = maker.from_weights(codes, flat, torch.full_like(flat, 8), 4, k // scale.shape[1])
    return lambda: layer(i["x"])


LINEAR = [bf16_linear(lambda i: i["w"])]
INT8 = [
    Peer("torch._int_mm, int32 out", int_mm, compared=False),
    Peer("torch._int_mm + scales", int_mm_scaled),
    bf16_linear(int8_weight),
    Peer("bitsandbytes int8, int32 out", bitsandbytes_int8, "bitsandbytes", compared=False),
]
DYNAMIC_INT8 = [
    bf16_linear(int8_weight),
    Peer("torchao int8 dynamic", torchao_int8, "torchao"),
    Peer("gemlite int8 dynamic", gemlite_int8, "gemlite"),
]
INT4 = [
    bf16_linear(int4_weight),
    Peer("torch tinygemm int4", tinygemm),
    Peer("torchao int4", torchao_int4, "torchao"),
    Peer("bitsandbytes nf4", bitsandbytes_nf4, "bitsandbytes"),
    Peer("gemlite int4", gemlite_int4, "gemlite"),
]

# attention


def sdpa(name: str, backend: SDPBackend, causal: bool) -> Peer:
    def build(i: Inputs):
        q, k, v = i["q"], *(i[n] if n in i else i[f"{n}_cache"] for n in ("k", "v"))
        if k.dtype == torch.int8:
            k, v = (i[f"{n}_cache"].float().mul(i[f"{n}_scale"][..., None]).to(q.dtype) for n in ("k", "v"))

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                )

        return call

    return Peer(f"sdpa {name}", build)


def sdpas(causal: bool) -> list[Peer]:
    return [
        sdpa("flash", SDPBackend.FLASH_ATTENTION, causal), sdpa("cudnn", SDPBackend.CUDNN_ATTENTION, causal),
    ]  # fmt: skip


def sage(causal: bool) -> Peer:
    def build(i: Inputs):
        from sageattention import sageattn

        return lambda: sageattn(i["q"], i["k"], i["v"], tensor_layout="HND", is_causal=causal)

    return Peer("sageattention", build, "sageattention")


def all_integer(causal: bool) -> Peer:
    """The other form of our own kernel, which rounds weights and values to 8 bits too."""

    def build(i: Inputs):
        from narrowcast.kernels.attention_int8 import attention_int8_triton as room

        call = functools.partial(room.attention_all_int8, causal=causal)
        return lambda: call(i["q"], i["k"], i["v"])

    return Peer("triton, all integers", build)


# the rest


def scaled_codes(i: Inputs):
    return lambda: i["q"].to(torch.bfloat16) * i["scale"][:, None].bfloat16()


def bitsandbytes_dequantize(i: Inputs):
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(int4_weight(i), blocksize=64, quant_type="nf4")
    return lambda: functional.dequantize_4bit(codes, state)


def rounded_rows(i: Inputs):
    def call() -> Tensor:
        x = i["x"].float()
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round().to(torch.int8)

    return call


def summed_norm(i: Inputs):
    return lambda: F.rms_norm(i["x"] + i["residual"], i["weight"].shape, i["weight"], 1e-6)


def convolution(layer: Any) -> Peer:
    """bfloat16 in channels-last by cuDNN, with the activation that ours has inside."""
    after = {"relu": F.relu, "relu6": F.relu6, "none": lambda y: y}[layer.activation]

    def build(i: Inputs):
        x, w = i.get("x"), i.get("w")
        if x is None:
            x = ((i["x_q"].float() - 128) * 0.02).bfloat16()
            w = int8_weight(i)
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        bias = i["bias"].bfloat16()
        return lambda: after(F.conv2d(x, w, bias, layer.stride, layer.kernel // 2, 1, layer.groups))

    return Peer("torch conv2d bf16", build)
