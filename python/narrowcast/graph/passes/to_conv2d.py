"""aten.conv2d and convolution -> narrowcast.conv2d; batch normalisation folded into the layer before it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..ir import Graph
from .match import LAYERS, Layer, argument, aten, calls, only_user, ops, value


def _pair(x) -> list[int]:
    return list(x) * 2 if len(x) == 1 else list(x)


def to_conv2d(graph: Graph) -> int:
    count = 0
    for node in graph.calls(aten.conv2d.default, aten.convolution.default, aten.conv2d.padding):
        defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        if node.target is aten.convolution.default:
            x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
            if transposed or len(stride) != 2:
                continue
        else:
            given = dict(zip(names, defaults)) | dict(zip(names, node.args)) | dict(node.kwargs)
            x, weight, bias, stride, padding, dilation, groups = (given[name] for name in names)
        tensor = graph.weight(weight)
        if tensor is None or tensor.dim() != 4 or value(x) is None or value(x).dim() != 4:
            continue
        stride, dilation = _pair(stride), _pair(dilation)
        if padding == "valid":
            padding = [0, 0]
        elif padding == "same":
            whole = [d * (k - 1) for d, k in zip(dilation, tensor.shape[2:])]
            if any(w % 2 for w in whole):
                continue
            padding = [w // 2 for w in whole]
        x, padding = _joined_padding(graph, x, _pair(padding))
        arguments = (x, weight, bias, stride, padding, dilation, groups)
        graph.replace(node, graph.add_call(ops.conv2d.default, arguments, like=node))
        count += 1
    graph.clean()
    return count


def _joined_padding(graph: Graph, x: fx.Node, padding: list[int]) -> tuple[fx.Node, list[int]]:
    """A call of pad with zeros as part of the convolution's own padding."""
    if not calls(x, aten.pad.default, aten.constant_pad_nd.default):
        return x, padding
    zeros = x.target is aten.constant_pad_nd.default or argument(x, 2, "mode", "constant") == "constant"
    number = argument(x, 3 if x.target is aten.pad.default else 2, "value")
    sides = x.args[1]
    if not zeros or number not in (None, 0) or len(sides) != 4 or not all(isinstance(s, int) for s in sides):
        return x, padding
    left, right, top, bottom = sides
    if min(sides) < 0:
        return x, padding
    starts, ends = [padding[0] + top, padding[1] + left], [padding[0] + bottom, padding[1] + right]
    return x.args[0], starts if starts == ends else starts + ends


def fold_batch_norm(graph: Graph) -> int:
    """y = (x - mean) / sqrt(var + eps) * weight + bias after a layer becomes part of its weights."""
    count = 0
    for node in graph.calls(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default):
        if node.target is aten.batch_norm.default:
            x, weight, bias, mean, variance, training, _, eps, _ = node.args
        else:
            x, weight, bias, mean, variance, _, eps = node.args
            training = False
        if training or not calls(x, *LAYERS) or only_user(x) is not node:
            continue
        if calls(x, ops.linear.default) and (value(x) is None or value(x).dim() != 2):
            continue  # its features are the last dimension, the norm's the second
        layer = Layer(x)
        tensors = [graph.weight(layer["weight"]), graph.weight(mean), graph.weight(variance)]
        if any(t is None for t in tensors) or layer["activation"] != "none" or layer["residual"] is not None:
            continue
        old, mean, variance = (t.double() for t in tensors)
        gain = torch.rsqrt(variance + eps)
        if weight is not None:
            gain = gain * graph.weight(weight).double()
        shift = -mean * gain
        if bias is not None:
            shift = shift + graph.weight(bias).double()
        if layer["bias"] is not None:
            shift = shift + graph.weight(layer["bias"]).double() * gain
        name, dtype = layer["weight"].target, tensors[0].dtype
        folded = (old * gain.reshape(-1, *[1] * (old.dim() - 1))).to(dtype)
        layer.set(
            weight=graph.add_weight(f"{name}.folded", folded, before=x),
            bias=graph.add_weight(f"{name}.folded_bias", shift.to(dtype), before=x),
        )
        for user in list(node.users):  # the functional form returns a tuple
            if calls(user, operator.getitem):
                graph.replace(user, x)
        graph.replace(node, x)
        count += 1
    return count
