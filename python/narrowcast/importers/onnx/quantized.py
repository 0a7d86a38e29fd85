"""Quantised weights in ONNX files: QuantizeLinear and DequantizeLinear, and MatMulNBits of com.microsoft.

``DequantizeLinear(q) = (q - zero_point) * scale``, one scale for all, per index of ``axis``, or per block of
``block_size`` along it. ``MatMulNBits``: B uint8 [N, blocks, block_size * bits / 8], codes lowest bits first along
K; scales [N * blocks]; zero_points packed per row in the same way, or of the type of the scales; 2^(bits - 1)
without. A pair of Quantize and Dequantize on an activation is evaluated as it stands, in float.

Semantics: docs/Operators.md of ONNX; docs/ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight
from narrowcast.importers.quantized.codes import FLOATS, check, unpack, with_minima, with_zeros

from .reader import DTYPES, Node
from .table import TABLE, _axis, _op

_CODES = (torch.int8, torch.uint8)
_RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}

#: Our own operator for a layer whose weight is known: (x, weight [N, K], bias).
LINEAR = "narrowcast.linear"
TABLE[LINEAR] = lambda node, opset, x, weight, bias=None: F.linear(x, weight, bias)


def _spread(node: Node, x: Tensor, t: Tensor) -> Tensor:
    """A scale or zero point in a shape that broadcasts over x."""
    if t.numel() == 1:
        return t.reshape(())
    axis = _axis(node, node.attributes.get("axis", 1), x.dim())
    block = node.attributes.get("block_size", 0)
    if block:
        if t.dim() != x.dim() or block < 0 or t.shape[axis] * block < x.shape[axis]:
            raise FormatError(f"node {node.name!r} ({node.op}): scales {list(t.shape)} in blocks of {block}")
        index = torch.arange(x.shape[axis]) // block
        return t.index_select(axis, index)
    if t.dim() != 1 or t.shape[0] != x.shape[axis]:
        raise FormatError(f"node {node.name!r} ({node.op}): {list(t.shape)} scales for axis {axis}")
    return t.reshape([-1 if i == axis else 1 for i in range(x.dim())])


@_op("QuantizeLinear")
def _quantize(node, opset, x, scale, zero=None):
    kind = node.attributes.get("output_dtype", 0)
    dtype = zero.dtype if zero is not None else DTYPES.get(kind, torch.uint8)
    if dtype not in _RANGES:
        raise UnsupportedError(f"node {node.name!r} (QuantizeLinear): the type {dtype} is not supported")
    y = torch.round(x / _spread(node, x, scale))
    if zero is not None:
        # A number stays a number: only a zero point per channel is a tensor in the graph.
        y = y + (_constant(node, zero) if zero.numel() == 1 else _spread(node, x, zero).to(y.dtype))
    return y.clamp(*_RANGES[dtype]).to(dtype)


def _constant(node: Node, value: Tensor) -> int:
    if isinstance(value, torch._subclasses.FakeTensor):
        raise UnsupportedError(f"node {node.name!r} ({node.op}): the zero point must be a constant")
    return int(value)


@_op("DequantizeLinear")
def _dequantize(node, opset, x, scale, zero=None):
    y = x.to(torch.float32)
    if zero is not None:
        y = y - (_constant(node, zero) if zero.numel() == 1 else _spread(node, x, zero).float())
    return (y * _spread(node, x, scale).float()).to(scale.dtype)


def form(node: Node, inputs: list[Tensor | None]) -> GroupedWeight | None:
    """The weight [N, K] whose transpose [K, N] a DequantizeLinear makes, or None where it has no exact form.

    With the attribute "turned" the result itself is the weight [N, K].
    """
    codes, scale, zero = [*inputs, None][:3]
    if codes.dim() != 2 or codes.dtype not in _CODES or scale.dtype not in FLOATS or 0 in codes.shape:
        return None
    axis, block = _axis(node, node.attributes.get("axis", 1), 2), node.attributes.get("block_size", 0)
    if node.attributes.get("turned", False):
        codes, axis = codes.t(), 1 - axis
        scale, zero = (t.t() if t is not None and t.dim() == 2 else t for t in (scale, zero))
    depth, rows = codes.shape
    size = block if block and axis == 0 else depth
    if (block and axis == 1) or (scale.numel() > 1 and not block and axis == 0):
        return None  # scales along the outputs of the other side
    groups = -(-depth // size)
    parts = []
    for t in (scale, zero):
        if t is None:
            parts.append(None)
            continue
        t = t.reshape(1, 1).expand(groups, rows) if t.numel() == 1 else t.reshape(groups, -1)
        parts.append(check(t, (t.dtype,), (groups, rows), f"the scales of node {node.name!r}").t())
    four = int(codes.min()) >= -8 and int(codes.max()) <= 15 and node.attributes.get("four_bits", False)
    zeros = 0 if parts[1] is None or not bool((parts[1] != 0).any()) else parts[1]
    return with_zeros(codes.t(), parts[0], zeros, 4 if four else 8, size)


def n_bits(node: Node, inputs: list[Tensor | None]) -> GroupedWeight:
    """The weight [N, K] of a MatMulNBits. inputs: B, scales, zero_points, g_idx."""
    packed, scales, zeros, index = [*inputs, None, None, None][:4]
    a = node.attributes
    depth, rows, bits, block = (a.get(k, d) for k, d in (("K", 0), ("N", 0), ("bits", 4), ("block_size", 0)))
    where = f"node {node.name!r} (MatMulNBits)"
    if packed is None or scales is None or index is not None:
        raise UnsupportedError(f"{where}: B and scales must be constants, without g_idx")
    if bits not in (2, 4, 8) or not 0 < block <= 1 << 20 or not 0 < depth <= 1 << 31 or rows < 1:
        raise FormatError(f"{where}: K {depth}, N {rows}, bits {bits}, block_size {block}")
    groups = -(-depth // block)
    width = block * bits // 8
    check(packed, (torch.uint8,), (rows, groups, width), f"{where}: B")
    if width % 4:
        raise UnsupportedError(f"{where}: blocks of {block} are no multiple of 4 bytes")
    codes = unpack(packed.reshape(rows, -1).view(torch.int32), bits, groups * block, f"{where}: B")
    codes = codes[:, :depth]
    if scales.numel() != rows * groups or scales.dtype not in FLOATS:
        raise FormatError(f"{where}: scales must be {rows * groups} floats")
    scales = scales.reshape(rows, groups)
    if zeros is None:
        return with_zeros(codes, scales, 1 << (bits - 1), bits, block)
    if zeros.is_floating_point():
        if zeros.numel() != rows * groups:
            raise FormatError(f"{where}: zero_points must be {rows * groups} floats")
        minimum = -zeros.reshape(rows, groups).float() * scales.float()
        return with_minima(codes, scales, minimum, bits, block)
    width = -(-groups * bits // 8)
    if zeros.dtype != torch.uint8 or zeros.numel() != rows * width:
        raise FormatError(f"{where}: zero_points must be {rows * width} bytes")
    padded = F.pad(zeros.reshape(rows, width), (0, -width % 4)).contiguous().view(torch.int32)
    points = unpack(padded, bits, padded.shape[1] * 32 // bits, where)[:, :groups]
    return with_zeros(codes, scales, points, bits, block)
