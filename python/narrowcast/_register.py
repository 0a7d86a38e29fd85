"""Fake (meta) implementations: the shape and dtype of every op's result, nothing computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formats import GGUF_BLOCKS

_fake = torch.library.register_fake


def _channels_last(x: Tensor, sizes: list, dtype: torch.dtype) -> Tensor:
    n, c, h, w = sizes
    return torch.empty_strided(sizes, (h * w * c, 1, w * c, c), dtype=dtype, device=x.device)


def _pooled(
    size,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int = 1,
    ceil: bool = False,
    end: int | None = None,
):
    span = size + padding + (padding if end is None else end) - dilation * (kernel - 1) - 1
    if not ceil:
        return span // stride + 1
    out = (span + stride - 1) // stride + 1
    return out - 1 if (out - 1) * stride >= size + padding else out


def _scales(x: Tensor, group_size: int) -> Tensor:
    shape = x.shape[:-1] if group_size == 0 else (*x.shape[:-1], x.shape[-1] // group_size)
    return x.new_empty(shape, dtype=torch.float32)


# quantize


def _laid_out_like(x, dtype):
    """What goes value by value keeps the layout of a dense tensor."""
    like = torch.empty_like(x, dtype=dtype)  # the strides of x if it is dense
    return like if like.stride() == x.stride() else x.new_empty(x.shape, dtype=dtype)


@_fake("narrowcast::quantize_int8")
def _(x, group_size=0, strict=False):
    return x.new_empty(x.shape, dtype=torch.int8), _scales(x, group_size)


@_fake("narrowcast::quantize_int8_asymmetric")
def _(x, strict=False):
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        _scales(x, 0),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    )


@_fake("narrowcast::quantize_int8_static")
def _(x, scale, zero_point=0, dtype=torch.int8, strict=False):
    return _laid_out_like(x, dtype)


# dequantize


@_fake("narrowcast::dequantize_int8")
def _(q, scale, zero_point=None, group_size=0, out_dtype=torch.float32):
    if scale.dim() == 0:
        return _laid_out_like(q, out_dtype)
    return q.new_empty(q.shape, dtype=out_dtype)


@_fake("narrowcast::dequantize_groups")
def _(packed, scale, offset, group_size, bits, out_dtype=torch.float32):
    n, row = packed.shape
    return packed.new_empty((n, row * 8 // bits), dtype=out_dtype)


@_fake("narrowcast::dequantize_gguf")
def _(blocks, type, out_dtype=torch.float32):
    elements, size = GGUF_BLOCKS[type]
    return blocks.new_empty((*blocks.shape[:-1], blocks.shape[-1] // size * elements), dtype=out_dtype)


# linear


@_fake("narrowcast::linear")
def _(
    x,
    weight,
    bias=None,
    activation="none",
    residual=None,
    out_dtype=None,
    *,
    post_activation="none",
):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or x.dtype)


@_fake("narrowcast::linear_int8")
def _(
    x_q, x_scale, w_q, w_scale, bias=None, activation="none", residual=None, out_dtype=None,
    x_zero_point=None, *, group_size=0, post_activation="none",
):  # fmt: skip
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype or torch.float32)


@_fake("narrowcast::linear_int8_requantize")
def _(
    x_q, x_scale, w_q, w_scale, bias, activation, residual, out_scale, out_zero_point=0,
    out_dtype=torch.int8, x_zero_point=None, *, group_size=0, post_activation="none",
):  # fmt: skip
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


@_fake("narrowcast::linear_dynamic_int8")
def _(
    x, w_q, w_scale, bias=None, activation="none", residual=None, out_dtype=None,
    *, group_size=0, asymmetric=False, post_activation="none", strict=False,
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], w_q.shape[0]), dtype=out_dtype or x.dtype)


@_fake("narrowcast::_linear_pack")
@_fake("narrowcast::_linear_int8_pack")
def _(weight):
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty((size,), dtype=torch.uint8)


@_fake("narrowcast::_linear_packed")
@_fake("narrowcast::_linear_dynamic_int8_packed")
def _(x, packed, out_features, *rest, out_dtype=None, **options):
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


@_fake("narrowcast::linear_grouped")
def _(
    x, packed, scale, offset, group_size, bits, bias=None, activation="none", residual=None,
    out_dtype=None, *, activation_bits=16, post_activation="none",
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=out_dtype or x.dtype)


@_fake("narrowcast::_linear_grouped_pack")
def _(packed, scale, offset, group_size, bits):
    n, row = packed.shape
    k, block = row * 8 // bits, math.gcd(group_size, 128)
    scales = 16 * (k // block) * scale.element_size() * (1 if offset is None else 2)
    panel = (16 * row + scales + 63) // 64 * 64
    return packed.new_empty(((n + 15) // 16 * panel,), dtype=torch.uint8)


@_fake("narrowcast::_linear_grouped_packed")
def _(
    x, panels, n, group_size, bits, half, has_offset, bias=None, activation="none", residual=None,
    out_dtype=None, *, activation_bits=16, post_activation="none",
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype)


# attention


def _attention(q, v):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@_fake("narrowcast::attention")
def _(q, k, v, *options, **named_options):
    return _attention(q, v)


@_fake("narrowcast::attention_int8")
def _(q, k, v, *options, **named_options):
    return _attention(q, v)


@_fake("narrowcast::attention_lse")
def _(q, k, v, *options, **named_options):
    return _attention(q, v), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("narrowcast::attention_decode")
def _(q, k_cache, v_cache, lengths, *options, **named_options):
    return q.new_empty(q.shape)


# convolution and pooling


def _conv(x, weight, stride, padding, dilation, dtype):
    kernel = weight.shape[2:]
    spatial = [
        _pooled(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], end=padding[i - 2])
        for i in (0, 1)
    ]
    return _channels_last(x, [x.shape[0], weight.shape[0], *spatial], dtype)


@_fake("narrowcast::conv2d")
def _(
    x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
    activation="none", residual=None, post_activation="none",
):  # fmt: skip
    return _conv(x, weight, stride, padding, dilation, x.dtype)


@_fake("narrowcast::conv2d_int8")
def _(
    x_q, x_scale, x_zero_point, w_q, w_scale, bias=None, stride=(1, 1), padding=(0, 0),
    dilation=(1, 1), groups=1, activation="none", residual=None, residual_scale=1.0,
    residual_zero_point=0, post_activation="none", out_scale=0.0, out_zero_point=0, out_dtype=None,
):  # fmt: skip
    dtype = out_dtype or (torch.float32 if out_scale == 0.0 else torch.uint8)
    return _conv(x_q, w_q, stride, padding, dilation, dtype)


@_fake("narrowcast::max_pool2d_int8")
def _(x_q, kernel_size, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    spatial = [
        _pooled(x_q.shape[2 + i], kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in (0, 1)
    ]
    return _channels_last(x_q, [*x_q.shape[:2], *spatial], x_q.dtype)


@_fake("narrowcast::avg_pool2d_int8")
def _(
    x_q, x_scale, x_zero_point, kernel_size=(), stride=(), padding=(0, 0), out_scale=0.0,
    out_zero_point=0, out_dtype=None,
):  # fmt: skip
    dtype = out_dtype or (torch.float32 if out_scale == 0.0 else torch.uint8)
    if not kernel_size:  # global
        return _channels_last(x_q, [*x_q.shape[:2], 1, 1], dtype)
    stride = stride or kernel_size
    spatial = [_pooled(x_q.shape[2 + i], kernel_size[i], stride[i], padding[i]) for i in (0, 1)]
    return _channels_last(x_q, [*x_q.shape[:2], *spatial], dtype)


# norms, rope, gated activations


@_fake("narrowcast::rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape)


@_fake("narrowcast::layer_norm")
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


@_fake("narrowcast::add_rms_norm")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_fake("narrowcast::add_layer_norm")
def _(x, residual, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_fake("narrowcast::rms_norm_int8")
def _(x, weight, eps, group_size=0):
    return x.new_empty(x.shape, dtype=torch.int8), _scales(x, group_size)


@_fake("narrowcast::layer_norm_int8")
def _(x, weight, bias, eps, group_size=0):
    return x.new_empty(x.shape, dtype=torch.int8), _scales(x, group_size)


@_fake("narrowcast::add_rms_norm_int8")
def _(x, residual, weight, eps, group_size=0):
    return x.new_empty(x.shape, dtype=torch.int8), _scales(x, group_size), x.new_empty(x.shape)


@_fake("narrowcast::add_layer_norm_int8")
def _(x, residual, weight, bias, eps, group_size=0):
    return x.new_empty(x.shape, dtype=torch.int8), _scales(x, group_size), x.new_empty(x.shape)


@_fake("narrowcast::rope")
def _(x, cos, sin, positions=None, interleaved=False):
    return x.new_empty(x.shape)


@_fake("narrowcast::silu_mul")
def _(gate, up):
    return gate.new_empty(gate.shape)


@_fake("narrowcast::gelu_mul")
def _(gate, up, approximate="none"):
    return gate.new_empty(gate.shape)


@_fake("narrowcast::silu_mul_int8")
def _(gate, up, group_size=0):
    return gate.new_empty(gate.shape, dtype=torch.int8), _scales(gate, group_size)


@_fake("narrowcast::gelu_mul_int8")
def _(gate, up, approximate="none", group_size=0):
    return gate.new_empty(gate.shape, dtype=torch.int8), _scales(gate, group_size)


# in-place and out= forms return nothing

for _op in (
    "kv_append", "linear.out", "linear_int8.out", "linear_dynamic_int8.out", "linear_grouped.out",
    "attention.out", "attention_decode.out", "conv2d_int8.out", "rms_norm.out", "layer_norm.out",
    "silu_mul.out", "gelu_mul.out",
):  # fmt: skip
    _fake(f"narrowcast::{_op}", lambda *args, **kwargs: None)


# An inference op has no gradient. Without this, backward() would leave x.grad None in silence.


def _refuse_gradients(op: str) -> None:
    def setup_context(ctx, inputs, output, keyword_only_inputs=None):
        raise RuntimeError(
            f"{op}: inputs must not require grad, this op has no gradient; "
            "call it under torch.no_grad() or torch.inference_mode()"
        )

    def backward(ctx, *grads):
        raise RuntimeError(f"{op}: has no gradient")

    torch.library.register_autograd(f"narrowcast::{op}", backward, setup_context=setup_context)


for _op in (
    "quantize_int8", "quantize_int8_asymmetric", "quantize_int8_static", "dequantize_int8",
    "dequantize_groups", "dequantize_gguf", "linear", "linear_int8", "linear_int8_requantize",
    "linear_dynamic_int8", "linear_grouped", "_linear_grouped_packed", "attention",
    "attention_lse", "attention_int8",
    "attention_decode", "conv2d", "conv2d_int8", "max_pool2d_int8", "avg_pool2d_int8", "rms_norm",
    "layer_norm", "add_rms_norm", "add_layer_norm", "rms_norm_int8", "layer_norm_int8",
    "add_rms_norm_int8", "add_layer_norm_int8", "rope", "silu_mul", "silu_mul_int8", "gelu_mul",
    "gelu_mul_int8",
):  # fmt: skip
    _refuse_gradients(_op)
