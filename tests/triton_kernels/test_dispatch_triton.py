"""Every op that is written in Triton, called as a CUDA tensor would call it: against the CPU's kernels, and its fake."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import narrowcast as nc
from conftest import DEVICE
from narrowcast import dispatch
from tolerances import relative_error

ops = torch.ops.narrowcast
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def arguments(op: str) -> tuple[list, dict]:
    x, w, wide = torch.randn(2, 3, 64), torch.randn(64), torch.randn(2, 3, 40)
    w_q, w_scale = int8(40, 64), torch.rand(40) / 64
    packed = torch.randint(0, 256, (40, 32), dtype=torch.uint8)
    q, k, v = torch.randn(2, 4, 5, 32), torch.randn(2, 2, 7, 32), torch.randn(2, 2, 7, 32)
    starts, lengths = (torch.tensor(t, dtype=torch.int32) for t in ([1, 0], [6, 7]))
    image, image_q = torch.randn(2, 8, 6, 5), int8(2, 8, 6, 5).view(torch.uint8)
    image, image_q = (t.contiguous(memory_format=torch.channels_last) for t in (image, image_q))
    linear = [torch.randn(40), "gelu", wide]
    return {
        "quantize_int8": ([x, 32], {}),
        "quantize_int8_asymmetric": ([x], {}),
        "quantize_int8_static": ([image, 0.05, 3, torch.uint8], {}),
        "dequantize_int8": ([int8(3, 64), torch.rand(3, 2), None, 32, torch.float16], {}),
        "dequantize_groups": ([packed, torch.rand(40, 2), None, 32, 4, torch.float16], {}),
        "dequantize_gguf": ([torch.randint(0, 60, (3, 36), dtype=torch.uint8), "Q4_0"], {}),
        "linear": ([x, torch.randn(40, 64), *linear], {"post_activation": "relu"}),
        "linear_int8": ([int8(2, 3, 64), torch.rand(2, 3), w_q, w_scale, *linear, torch.float16], {}),
        "linear_int8_requantize": ([int8(3, 64), torch.rand(3), w_q, w_scale, None, "relu", None, 0.7], {}),
        "linear_dynamic_int8": ([x, w_q, w_scale, *linear], {"group_size": 32}),
        "linear_grouped": ([x, packed, torch.rand(40, 2) / 9, None, 32, 4, *linear], {}),
        "attention": ([q, k, v, None, 0.2, True], {}),
        "attention_lse": ([q, k, v, None, 0.2, True], {}),
        "attention_int8": ([q, k, v, None, 0.2, True], {}),
        "attention_decode": ([q[:, :, :1], k, v, lengths], {}),
        "kv_append": ([torch.zeros_like(k), torch.zeros_like(v), k[:, :, :3], v[:, :, :3], starts], {}),
        "conv2d": ([image, torch.randn(8, 8, 3, 3), torch.randn(8), [1, 1], [1, 1]], {}),
        "conv2d_int8": ([image_q, 0.02, 3, int8(8, 8, 3, 3), torch.rand(8) / 9, torch.randn(8)], {}),
        "max_pool2d_int8": ([image_q, [2, 2], [2, 2]], {}),
        "avg_pool2d_int8": ([image_q, 0.1, 3, [2, 2], [2, 2]], {}),
        "rms_norm": ([x, w, 1e-5], {}),
        "add_rms_norm": ([x, x.flip(0), w, 1e-5], {}),
        "rms_norm_int8": ([x, w, 1e-5, 32], {}),
        "add_rms_norm_int8": ([x, x.flip(0), w, 1e-5], {}),
        "layer_norm": ([x, w, w, 1e-5], {}),
        "add_layer_norm": ([x, x.flip(0), w, w, 1e-5], {}),
        "layer_norm_int8": ([x, w, None, 1e-5], {}),
        "add_layer_norm_int8": ([x, x.flip(0), None, w, 1e-5, 32], {}),
        "rope": ([q, torch.rand(9, 16), torch.rand(9, 16), starts, True], {}),
        "silu_mul": ([x, x.flip(0)], {}),
        "silu_mul_int8": ([x, x.flip(0), 32], {}),
        "gelu_mul": ([x, x.flip(0), "tanh"], {}),
        "gelu_mul_int8": ([x, x.flip(0), "none"], {}),
    }[op]


WRITTEN = [op for op in dispatch.ROOM_OF if op not in dispatch.EVERYWHERE and dispatch.triton_module(op)]


def moved(values, to):
    return [to(v) if isinstance(v, torch.Tensor) else v for v in values]


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result or ())


@pytest.mark.parametrize("op", WRITTEN)
def test_called_through_the_dispatcher(op):
    overload = getattr(ops, op).default
    given, options = arguments(op)
    on_cpu = moved(given, lambda t: t.cpu().clone(memory_format=torch.preserve_format))
    expected = as_tuple(overload(*on_cpu, **options))
    with nc.backend("triton"):
        result = as_tuple(overload.redispatch(CUDA, *given, **options))
    if not expected:  # what it wrote
        expected, result = on_cpu[:2], given[:2]
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.device.type == DEVICE
        if ours.is_floating_point():
            assert relative_error(ours.cpu(), theirs) < 2e-3
        else:  # a code may fall to the other side of a tie
            assert (ours.cpu().int() - theirs.int()).abs().max() <= 1
    with FakeTensorMode() as mode, torch.device("cpu"):
        fake = as_tuple(overload(*moved(on_cpu, mode.from_tensor), **options))
    for ours, theirs in zip(result, fake, strict=False):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())


@pytest.mark.parametrize("op", [op for op in WRITTEN if "out" in getattr(ops, op).overloads()])
def test_out_form(op):
    packet = getattr(ops, op)
    given, options = arguments(op)
    names = [a.name for a in packet.default._schema.arguments]
    named = {**dict(zip(names, given)), **options}
    with nc.backend("triton"):
        expected = packet.default.redispatch(CUDA, **named)
        named.pop("out_dtype", None)
        out = torch.empty_like(expected)
        packet.out.redispatch(CUDA, **named, out=out)
        assert torch.equal(out, expected)
        with pytest.raises(RuntimeError, match=f"{op}: out must be"):
            packet.out.redispatch(CUDA, **named, out=out[:1])
