"""Round-to-nearest in our own formats: what a recipe of the same bytes has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.compress import api, cnn
from narrowcast.compress.adaround import RoundedConv
from narrowcast.compress.gptq import Grid, Rounded
from narrowcast.compress.half_attention import narrow_attention
from narrowcast.compress.transformer import int4_targets, quantize_grouped
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.graph.passes.match import Layer
from narrowcast.importers.model import Model


def nearest_plan(
    model: Model, group_size: int = 32, symmetric: bool = False, data: Tensor | None = None
) -> Plan:
    """The int4 plan of a model with every weight at the nearest code of its group's whole range.

    All else is that of recipe int4: which layers, int8 tables, int8 activations. data: pictures for a CNN's
    activation ranges; its layers have one scale per output channel, and biases are not corrected.
    """
    if model.kind == "image":
        return _image(model, data)
    graph, _ = optimize(Graph.from_exported(model.exported))
    targets = int4_targets(graph, group_size, api.INT4_ACTIVATION_BITS, set(), symmetric)
    rounded = {
        node: nearest_codes(graph.weight(Layer(node)["weight"]), target.grid, target.group_size)
        for node, target in targets.items()
    }
    quantize_grouped(
        graph, {}, 4, group_size, api.INT4_ACTIVATION_BITS, set(), symmetric=symmetric, rounded=rounded
    )
    narrow_attention(graph)
    graph.clean()
    graph.native = {}
    return Plan(graph, model.kind, "int4", config=model.config, assets=model.assets)


def nearest_codes(weight: Tensor, grid: Grid, group_size: int) -> Rounded:
    """A weight [N, K] at the nearest codes of 16, from its groups' least to their largest value.

    Without zero points the value furthest from zero gets the code -8.
    """
    groups = weight.detach().float().unflatten(1, (-1, group_size))
    if grid.zero_point:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / grid.high).half().float()
        scale = torch.where(scale == 0, 1.0, scale)
        offset = (-(-low / scale).round().clamp(grid.low, grid.high) * scale).half().float()
    else:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = (largest / grid.low).half().float()
        scale, offset = torch.where(scale == 0, 1.0, scale), torch.zeros_like(scale)
    codes = ((groups - offset[..., None]) / scale[..., None]).round().clamp(grid.low, grid.high)
    return Rounded(grid, group_size, codes.to(torch.int8).flatten(1), scale, offset)


def _image(model: Model, data: Tensor | None) -> Plan:
    """Its layers and ranges are those that recipe int4 chooses; only the weights and biases are others."""
    learned = cnn.round_convs

    def at_nearest(graph, inputs, ranges, bits, *_) -> dict:
        return {node: _nearest_conv(graph, node, count) for node, count in bits.items()}

    cnn.round_convs = at_nearest
    try:
        return api.compress(model, recipe="int4", data=data)
    finally:
        cnn.round_convs = learned


def _nearest_conv(graph: Graph, node, bits: int) -> RoundedConv:
    layer = Layer(node)
    weight = graph.weight(layer["weight"]).detach().float()
    most = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-30) / most
    codes = (weight / scale.reshape(-1, 1, 1, 1)).round().clamp(-most, most).to(torch.int8)
    bias = torch.zeros(len(scale)) if layer["bias"] is None else graph.weight(layer["bias"]).float()
    return RoundedConv(bits, codes, scale, bias, name=cnn.layer_name(layer))
