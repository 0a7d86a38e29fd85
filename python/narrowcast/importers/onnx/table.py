"""What each ONNX operator means, in torch. One function per operator: (node, opset, *inputs) -> output.

Semantics: the ONNX operator specification (docs/Operators.md), opsets 7 and up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError

from .reader import DTYPES, MAX_DIM, MAX_RANK, Node

#: Elements that one node may make out of nothing (ConstantOfShape, Expand).
MAX_MADE = 1 << 28

TABLE: dict[str, Callable[..., Any]] = {}


def _op(*names: str):
    def register(function):
        for name in names:
            TABLE[name] = function
        return function

    return register


def _simple(name: str, function: Callable[..., Tensor]) -> None:
    TABLE[name] = lambda node, opset, *inputs: function(*inputs)


for _name, _function in {
    "Abs": torch.abs, "Add": torch.add, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf,
    "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "Log": torch.log,
    "MatMul": torch.matmul, "Mul": torch.mul, "Neg": torch.neg, "Pow": torch.pow,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Sin": torch.sin,
    "Sqrt": torch.sqrt, "Sub": torch.sub, "Tanh": torch.tanh, "Where": torch.where,
    "Equal": torch.eq, "Greater": torch.gt, "Less": torch.lt, "Not": torch.logical_not,
}.items():  # fmt: skip
    _simple(_name, _function)

_simple("Identity", lambda x: x)


def integers(node: Node, value: Tensor | None, what: str) -> list[int]:
    """The values of an input that must be known when the model is imported."""
    if value is None or not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        raise FormatError(f"node {node.name!r} ({node.op}): {what} must be given as integers")
    if isinstance(value, torch._subclasses.FakeTensor):
        raise UnsupportedError(
            f"node {node.name!r} ({node.op}): {what} depends on the input; a constant would be needed"
        )
    return value.flatten().tolist()


def _axis(node: Node, axis: int, rank: int) -> int:
    if not -rank <= axis < max(rank, 1):
        raise FormatError(f"node {node.name!r} ({node.op}): axis {axis} of {rank}")
    return axis % max(rank, 1)


def _made(node: Node, sizes: list[int]) -> list[int]:
    if len(sizes) > MAX_RANK or any(not 0 <= s <= MAX_DIM for s in sizes) or math.prod(sizes) > MAX_MADE:
        raise FormatError(f"node {node.name!r} ({node.op}): the size {sizes} is out of range")
    return sizes


@_op("Dropout")
def _dropout(node, opset, x, ratio=None, training=None):
    if training is not None and any(integers(node, training.long(), "training_mode")):
        raise UnsupportedError(f"node {node.name!r} (Dropout) is in training mode")
    return x


@_op("Div")
def _div(node, opset, a, b):
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@_op("Sum", "Max", "Min", "Mean")
def _many(node, opset, *inputs):
    combine = {"Max": torch.maximum, "Min": torch.minimum}.get(node.op, torch.add)
    result = inputs[0]
    for x in inputs[1:]:
        result = combine(result, x)
    return result / len(inputs) if node.op == "Mean" else result


@_op("Constant")
def _constant(node, opset):
    if "value" in node.attributes:
        return node.attributes["value"]
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64)):
        for key in (name, name + "s"):
            if key in node.attributes:
                return torch.tensor(node.attributes[key], dtype=dtype)
    raise UnsupportedError(f"node {node.name!r} (Constant) has a value of an unknown kind")


@_op("ConstantOfShape")
def _constant_of_shape(node, opset, shape):
    fill = node.attributes.get("value", torch.zeros(1))
    return fill.flatten()[0].expand(_made(node, integers(node, shape, "the shape"))).contiguous()


@_op("Cast")
def _cast(node, opset, x):
    if node.attributes.get("to") not in DTYPES:
        raise UnsupportedError(f"node {node.name!r} (Cast): type {node.attributes.get('to')} is not known")
    return x.to(DTYPES[node.attributes["to"]])


def _windows(node: Node, x: Tensor, kernel: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and the padding before and after each axis."""
    n = len(kernel)
    a = node.attributes
    strides, dilations = a.get("strides", [1] * n), a.get("dilations", [1] * n)
    pads = a.get("pads", [0] * 2 * n)
    if (
        n not in (1, 2, 3)
        or len(strides) != n
        or len(dilations) != n
        or len(pads) != 2 * n
        or x.dim() != n + 2
    ):
        raise FormatError(f"node {node.name!r} ({node.op}): kernel, strides, dilations or pads do not fit")
    if min(*kernel, *strides, *dilations) < 1 or min(pads) < 0 or max(*kernel, *strides, *pads) > MAX_DIM:
        raise FormatError(f"node {node.name!r} ({node.op}): sizes must be positive")
    before, after = pads[:n], pads[n:]
    auto = a.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for i in range(n):
            size = x.shape[2 + i]
            if not isinstance(size, int):
                raise UnsupportedError(f"node {node.name!r} ({node.op}): {auto} needs a fixed input size")
            reach = (kernel[i] - 1) * dilations[i] + 1
            total = max((-(-size // strides[i]) - 1) * strides[i] + reach - size, 0)
            small, large = total // 2, total - total // 2
            before.append(small if auto == "SAME_UPPER" else large)
            after.append(large if auto == "SAME_UPPER" else small)
    elif auto == "VALID":
        before, after = [0] * n, [0] * n
    elif auto != "NOTSET":
        raise FormatError(f"node {node.name!r} ({node.op}): auto_pad {auto!r}")
    return strides, dilations, before, after


def _pad_uneven(
    x: Tensor, before: list[int], after: list[int], value: float = 0.0
) -> tuple[Tensor, list[int]]:
    """Padding that differs between the sides is done apart; what stays goes into the window operation."""
    if before == after:
        return x, before
    flat = [p for pair in zip(reversed(before), reversed(after)) for p in pair]
    return F.pad(x, flat), [0] * len(before)


@_op("Conv")
def _conv(node, opset, x, weight, bias=None):
    strides, dilations, before, after = _windows(node, x, list(weight.shape[2:]))
    x, padding = _pad_uneven(x, before, after)
    function = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]
    return function(x, weight, bias, strides, padding, dilations, node.attributes.get("group", 1))


@_op("MaxPool")
def _max_pool(node, opset, x):
    kernel = node.attributes.get("kernel_shape", [])
    strides, dilations, before, after = _windows(node, x, kernel)
    ceil = bool(node.attributes.get("ceil_mode", 0))
    if before != after or any(2 * p > k for p, k in zip(before, kernel)):
        flat = [p for pair in zip(reversed(before), reversed(after)) for p in pair]
        x, before = F.pad(x, flat, value=-math.inf), [0] * len(kernel)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return function(x, kernel, strides, before, dilations, ceil)


@_op("AveragePool")
def _average_pool(node, opset, x):
    kernel = node.attributes.get("kernel_shape", [])
    strides, dilations, before, after = _windows(node, x, kernel)
    counted, ceil = (
        bool(node.attributes.get("count_include_pad", 0)),
        bool(node.attributes.get("ceil_mode", 0)),
    )
    if set(dilations) != {1}:
        raise UnsupportedError(f"node {node.name!r} (AveragePool): dilations are not supported")
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    if before == after and all(2 * p <= k for p, k in zip(before, kernel)):
        return function(x, kernel, strides, before, ceil, counted)
    if ceil:
        raise UnsupportedError(f"node {node.name!r} (AveragePool): ceil_mode with uneven padding")
    flat = [p for pair in zip(reversed(before), reversed(after)) for p in pair]
    sums = function(F.pad(x, flat), kernel, strides)
    if counted:
        return sums
    return sums / function(F.pad(torch.ones_like(x[:1, :1]), flat), kernel, strides)


@_op("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node, opset, x):
    axes = list(range(2, x.dim()))
    return x.amax(axes, keepdim=True) if node.op == "GlobalMaxPool" else x.mean(axes, keepdim=True)


@_op("LRN")
def _lrn(node, opset, x):
    a = node.attributes
    return F.local_response_norm(
        x, a.get("size", 1), a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0)
    )


@_op("BatchNormalization")
def _batch_norm(node, opset, x, scale, bias, mean, variance):
    if node.attributes.get("training_mode", 0):
        raise UnsupportedError(f"node {node.name!r} (BatchNormalization) is in training mode")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.attributes.get("epsilon", 1e-5))


@_op("Gemm")
def _gemm(node, opset, a, b, c=None):
    t = node.attributes
    alpha, beta = t.get("alpha", 1.0), t.get("beta", 1.0)
    a = a.t() if t.get("transA", 0) else a
    b = b if t.get("transB", 0) else b.t()
    # A bias of one row is the layer that it looks like.
    if alpha == 1.0 and (c is None or (beta == 1.0 and c.dim() == 1 and c.shape[0] == b.shape[0])):
        return F.linear(a, b, c)
    y = alpha * F.linear(a, b)
    return y if c is None else y + beta * c


@_op("Softmax", "LogSoftmax")
def _softmax(node, opset, x):
    function = torch.softmax if node.op == "Softmax" else torch.log_softmax
    axis = _axis(node, node.attributes.get("axis", -1 if opset >= 13 else 1), x.dim())
    if opset >= 13 or axis == x.dim() - 1:
        return function(x, axis)
    # Before opset 13 every axis from this one on belonged to one distribution.
    return function(x.flatten(axis), axis).reshape(x.shape)


@_op("LeakyRelu")
def _leaky_relu(node, opset, x):
    return F.leaky_relu(x, node.attributes.get("alpha", 0.01))


@_op("HardSigmoid")
def _hard_sigmoid(node, opset, x):
    return (x * node.attributes.get("alpha", 0.2) + node.attributes.get("beta", 0.5)).clamp(0, 1)


@_op("Gelu")
def _gelu(node, opset, x):
    return F.gelu(x, approximate=node.attributes.get("approximate", "none"))


@_op("Clip")
def _clip(node, opset, x, low=None, high=None):
    if opset < 11:
        low, high = node.attributes.get("min"), node.attributes.get("max")
    values = []
    for bound in (low, high):
        if isinstance(bound, Tensor):
            if isinstance(bound, torch._subclasses.FakeTensor):
                return torch.clamp(x, low, high)
            bound = bound.item()
        values.append(bound)
    return torch.clamp(x, *values) if any(v is not None for v in values) else x


@_op("Flatten")
def _flatten(node, opset, x):
    axis = node.attributes.get("axis", 1)
    axis = axis if axis == x.dim() else _axis(node, axis, x.dim())
    if axis == 1:
        return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@_op("Reshape")
def _reshape(node, opset, x, shape):
    sizes: list[Any] = integers(node, shape, "the shape")
    if len(sizes) > MAX_RANK:
        raise FormatError(f"node {node.name!r} (Reshape): more than {MAX_RANK} sizes")
    if not node.attributes.get("allowzero", 0):
        if any(s == 0 and i >= x.dim() for i, s in enumerate(sizes)):
            raise FormatError(f"node {node.name!r} (Reshape): 0 keeps a size that is not there")
        sizes = [x.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


@_op("Transpose")
def _transpose(node, opset, x):
    order = node.attributes.get("perm", list(reversed(range(x.dim()))))
    if sorted(order) != list(range(x.dim())):
        raise FormatError(f"node {node.name!r} (Transpose): {order} is no order of {x.dim()} axes")
    return x.permute(order)


@_op("Concat")
def _concat(node, opset, *inputs):
    return torch.cat(inputs, _axis(node, node.attributes.get("axis", 1), inputs[0].dim()))


@_op("Squeeze", "Unsqueeze")
def _squeeze(node, opset, x, axes=None):
    given = node.attributes.get("axes") if opset < 13 else None
    if axes is not None:
        given = integers(node, axes, "the axes")
    if node.op == "Squeeze":
        if given is None:
            return x.squeeze()
        return x.squeeze(sorted({_axis(node, a, x.dim()) for a in given}))
    if given is None or x.dim() + len(given) > MAX_RANK:
        raise FormatError(f"node {node.name!r} (Unsqueeze): axes {given}")
    for axis in sorted(_axis(node, a, x.dim() + len(given)) for a in given):
        x = x.unsqueeze(axis)
    return x


@_op("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduce(node, opset, x, axes=None):
    given = integers(node, axes, "the axes") if axes is not None else node.attributes.get("axes")
    if not given and node.attributes.get("noop_with_empty_axes", 0):
        return x
    given = [_axis(node, a, x.dim()) for a in given] if given else list(range(x.dim()))
    function = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax}
    return function.get(node.op, torch.amin)(x, given, keepdim=bool(node.attributes.get("keepdims", 1)))


@_op("Pad")
def _pad(node, opset, x, pads=None, value=None, axes=None):
    sides = node.attributes.get("pads") if opset < 11 else integers(node, pads, "the pads")
    fill = node.attributes.get("value", 0.0) if opset < 11 else 0.0 if value is None else value.item()
    chosen = list(range(x.dim())) if axes is None else integers(node, axes, "the axes")
    if sides is None or len(sides) != 2 * len(chosen) or max(map(abs, sides), default=0) > MAX_DIM:
        raise FormatError(f"node {node.name!r} (Pad): pads {sides}")
    if math.prod(1 + max(p, 0) for p in sides) > MAX_MADE:
        raise FormatError(f"node {node.name!r} (Pad): the pads {sides} are out of range")
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(
        node.attributes.get("mode", "constant")
    )
    if mode is None:
        raise UnsupportedError(f"node {node.name!r} (Pad): the mode {node.attributes['mode']!r}")
    both = [[0, 0] for _ in range(x.dim())]
    for i, axis in enumerate(chosen):
        both[_axis(node, axis, x.dim())] = [sides[i], sides[i + len(chosen)]]
    while mode != "constant" and len(both) > 1 and both[0] == [0, 0] and len(both) > x.dim() - 2:
        both.pop(0)
    flat = [p for pair in reversed(both) for p in pair]
    return F.pad(x, flat, mode, fill) if mode == "constant" else F.pad(x, flat, mode)


@_op("Split")
def _split(node, opset, x, sizes=None):
    axis = _axis(node, node.attributes.get("axis", 0), x.dim())
    parts = node.attributes.get("split") if sizes is None else integers(node, sizes, "the sizes")
    if parts is None:
        count = node.attributes.get("num_outputs", len(node.outputs))
        return torch.split(x, -(-x.shape[axis] // max(count, 1)), axis)
    return torch.split(x, parts, axis)


@_op("Gather")
def _gather(node, opset, x, index):
    axis = _axis(node, node.attributes.get("axis", 0), x.dim())
    index = index.long()
    index = torch.where(index < 0, index + x.shape[axis], index)
    if index.dim() == 0:
        return x.index_select(axis, index.reshape(1)).squeeze(axis)
    picked = x.index_select(axis, index.flatten())
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
