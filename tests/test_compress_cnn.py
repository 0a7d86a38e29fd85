"""Methods for convolutional networks: each against what it promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrowcast as nc
from narrowcast.compress import adaround, ranges
from narrowcast.compress.equalize import equalize, pairs
from narrowcast.compress.simulation import Simulation, float_outputs
from narrowcast.errors import ArgumentError
from narrowcast.exporters.onnx import write_onnx
from narrowcast.graph import Graph, Plan, int4_codes
from narrowcast.graph.passes import optimize
from narrowcast.graph.passes.match import Layer
from narrowcast.importers.model import Model

AUTO = torch.export.Dim.AUTO
ops = torch.ops.narrowcast


def graph_of(module: nn.Module, *inputs: torch.Tensor) -> Graph:
    shapes = tuple({0: AUTO} for _ in inputs)
    graph, _ = optimize(
        Graph.from_exported(torch.export.export(module.eval(), inputs, dynamic_shapes=shapes))
    )
    return graph


# --- ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_every_rule_makes_a_range_that_holds_most_values(signed):
    x = torch.randn(4, 8, 16, 16)
    x = x if signed else x.relu()
    edge = ranges.Edge()
    edge.add(x, torch.Generator().manual_seed(0))
    errors = {}
    for method in ranges.METHODS:
        scale, zero = edge.quantiser(method)
        assert scale > 0 and (zero > 0) == signed
        restored = ranges.fake_quantised(x, (scale, zero))
        q = ops.quantize_int8_static(x, scale, zero, torch.uint8)
        assert ((q.float() - zero) * scale - restored).abs().max() < 1e-5
        kept = ranges.fake_quantised(edge.sample, (scale, zero)) - edge.sample
        errors[method] = kept.square().mean().item()
    # All three are one family of clipped ranges, of which "mse" is the best on the sample.
    assert errors["mse"] <= min(errors["min-max"], errors["kl"]) and errors["min-max"] < 1e-3


def test_ranges_are_chosen_by_the_output():
    """One value in thousands is large and all that counts: the rules that clip it lose, whatever they save inside."""
    x = torch.rand(8, 4, 16, 16)
    x[:2, 0, 0, 0] = 40.0
    edge, node = ranges.Edge(), object()
    edge.add(x, torch.Generator().manual_seed(0))

    def error(chosen):
        return (ranges.fake_quantised(x, chosen[node])[:2, 0, 0, 0] - 40).abs().mean().item()

    chosen, tried = ranges.choose_method({node: edge}, error)
    assert set(tried) == set(ranges.METHODS) and error(chosen) == min(tried.values()) < 0.2
    clipped = {node: edge.quantiser("99.9 %")}
    refined, changed = ranges.refine_edges({node: edge}, clipped, error, 10)
    assert changed == 1 and error(refined) < error(clipped)


# --- equalisation ---------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two dense layers with a depthwise one between them, of very unlike channels."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last, self.activation = nn.Conv2d(16, 12, 1), activation
        with torch.no_grad():
            unlike = 4 ** torch.linspace(-3, 3, 16)[torch.randperm(16)].reshape(-1, 1, 1, 1)
            self.first.weight.mul_(unlike)
            self.first.bias.zero_()
            self.last.weight.div_(unlike.reshape(1, -1, 1, 1))

    def forward(self, x):
        x = self.activation(self.middle(self.activation(self.first(x))))
        return self.last(x).mean((2, 3))


@pytest.mark.parametrize("activation", [F.relu, F.relu6], ids=["relu", "relu6"])
def test_equalisation_changes_nothing_but_the_strain(activation):
    x = torch.randn(8, 3, 12, 12)
    graph = graph_of(Chain(activation), x)
    reference = graph.run(x)[0]
    report = equalize(graph, [(x,)], [(x,)])
    assert report["pairs"] == 2 and report["kept"] == (report["after"] < report["before"])
    torch.testing.assert_close(graph.run(x)[0], reference, atol=1e-4, rtol=1e-4)
    if activation is F.relu:
        assert report["kept"] and report["after"] < 0.5 * report["before"]


def test_equalisation_leaves_what_does_not_scale():
    assert not pairs(graph_of(Chain(F.silu), torch.randn(2, 3, 12, 12)))


# --- rounding -------------------------------------------------------------------------------------

CONVOLUTIONS = [
    {"kernel_size": (1, 1)},
    {"kernel_size": (3, 3), "padding": 1},
    {"kernel_size": (3, 3), "stride": 2, "padding": 1},
    {"kernel_size": (3, 3), "dilation": 2, "padding": 2},
    {"kernel_size": (3, 3), "groups": 12},
    {"kernel_size": (1, 5), "groups": 3},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_unfolded_inputs_times_the_weight_are_the_convolution(options):
    conv, x = nn.Conv2d(12, 24, **options), torch.randn(3, 12, 9, 11)
    graph = graph_of(conv, x)
    (node,) = graph.calls(ops.conv2d.default)
    layer, expected = Layer(node), graph.run(x)[0]
    at = adaround.places(expected.shape, 50, torch.Generator().manual_seed(0))
    rows = adaround.unfold(x, layer, at, conv.kernel_size)
    y = rows @ conv.weight.reshape(conv.groups, 24 // conv.groups, -1).transpose(1, 2)
    y = y.transpose(0, 1).reshape(50, 24) + conv.bias
    torch.testing.assert_close(y, expected[at[0], :, at[1], at[2]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 16])
def test_learnt_rounding_is_never_worse_than_the_nearest(groups):
    conv, x = nn.Conv2d(16, 32, 3, padding=1, groups=groups), torch.randn(6, 16, 10, 10)
    x = x @ torch.randn(10, 10) + x.roll(1, 1)  # inputs that know of each other
    graph = graph_of(nn.Sequential(conv, nn.ReLU6()), x)
    (node,) = graph.calls(ops.conv2d.default)
    layer, generator = Layer(node), torch.Generator().manual_seed(0)
    at = adaround.places((6, 32, 10, 10), 600, generator)
    ours = adaround.unfold(x, layer, at, (3, 3))
    aim = ours @ conv.weight.detach().reshape(groups, 32 // groups, -1).transpose(1, 2)
    aim = aim + conv.bias.detach().reshape(groups, 1, -1)
    rows = adaround.Rows(ours, aim)
    weight, bias = conv.weight.detach(), conv.bias.detach()
    nearest = adaround.round_conv(layer, weight, bias, None, 4, False, generator)
    assert nearest.rule == "nearest" and "no calibration data" in nearest.notes[0]
    learnt = adaround.round_conv(layer, weight, bias, rows, 4, True, generator)
    assert learnt.codes.min() >= -8 and learnt.codes.max() <= 7 and learnt.codes.shape == weight.shape
    with torch.no_grad():
        expected = conv(x).clamp(0, 6)
        error = [
            (F.conv2d(x, made.dequantize(), made.bias, padding=1, groups=groups).clamp(0, 6) - expected)
            .square()
            .mean()
            for made in (nearest, learnt)
        ]
    assert error[1] < error[0]


def test_simulation_is_what_the_plan_computes():
    """The plan rounds the same numbers, so outputs differ by single codes only."""
    from narrowcast.compress.cnn import rewrite
    from narrowcast.compress.round_convs import round_convs

    x = torch.randn(8, 3, 12, 12)
    graph = graph_of(Chain(F.relu), x)
    edges = ranges.observe_edges(graph, [(x,)])
    chosen = {node: edge.quantiser() for node, edge in edges.items()}
    bits = dict.fromkeys(graph.calls(ops.conv2d.default), 8)
    rounded = round_convs(graph, [(x,)], chosen, bits)
    weights = {node: (made.dequantize(), made.bias) for node, made in rounded.items()}
    simulated = Simulation(graph, [(x,)], chosen, weights).outputs()[0]
    (reference,) = float_outputs(graph, [(x,)])
    rewrite(graph, rounded, chosen)
    computed = graph.run(x)[0]
    assert (computed - simulated).norm() < 0.02 * reference.norm()


# --- 4-bit codes in a plan ------------------------------------------------------------------------


def test_codes_are_packed_in_the_file_and_unpacked_once(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the package that writes ONNX")
    codes = torch.randint(-8, 8, (16, 8, 3, 3), dtype=torch.int8)
    graph = graph_of(nn.Conv2d(8, 16, 3), torch.randn(2, 8, 9, 9))
    (node,) = graph.calls(ops.conv2d.default)
    q = graph.add_call(ops.quantize_int8_static.default, (node.args[0], 0.05, 128, torch.uint8), like=node)
    packed = int4_codes.add_codes(graph, "conv.packed", codes, before=node)
    scale = graph.add_weight("conv.scale", torch.rand(16) + 0.1, before=node)
    made = graph.add_call(ops.conv2d_int8.default, (q, 0.05, 128, packed, scale), like=node)
    graph.replace(node, made)
    graph.clean()
    assert int4_codes.is_codes(packed) and graph.weights["conv.packed"].nbytes == codes.numel() // 2
    x = torch.randn(3, 8, 9, 9)
    expected = ops.conv2d_int8(
        ops.quantize_int8_static(x, 0.05, 128, torch.uint8), 0.05, 128, codes, graph.weights["conv.scale"]
    )
    assert torch.equal(graph.run(x)[0], expected)
    Plan(graph, "generic", "int4").save(tmp_path / "codes.plan")
    plan = Plan.load(tmp_path / "codes.plan")
    assert (tmp_path / "codes.plan").stat().st_size < codes.numel() // 2 + 8192
    exe = nc.Executor(plan, device="cpu")
    assert torch.equal(exe(x), expected)
    assert not [row for row in exe.explain(x).rows if "dequantize_groups" in row.op]
    write_onnx(tmp_path / "codes.onnx", graph)
    written = {w.name: w for w in onnx.load(tmp_path / "codes.onnx").graph.initializer}
    assert written["conv.packed.int8"].data_type == onnx.TensorProto.INT8
    nodes, weights = int4_codes.resolved(plan.graph.fx, plan.graph.weights)
    assert torch.equal(weights["conv.packed.int8"], codes) and "conv.packed.int8" not in plan.graph.weights
    assert [n.target for n in nodes.nodes if n.op == "get_attr"] == ["conv.packed.int8", "conv.scale"]


# --- models made for one picture ------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [1, 3])
def test_a_fixed_batch_is_fed_as_many_pictures_as_it_takes(fixed):
    torch.manual_seed(fixed)
    module = nn.Sequential(Chain(F.relu), nn.Linear(12, 5)).eval()
    exported = torch.export.export(module, (torch.randn(fixed, 3, 12, 12),))
    model = Model(exported, "image", {"image": {"size": 12}})
    pictures = torch.randn(41, 3, 12, 12)
    plan = nc.compress(model, recipe="int8", data=pictures)
    result = nc.evaluate(plan, pictures, model, device="cpu")
    assert result.count == 41 and result.metrics["kl"].value < 0.05
    if fixed == 3:
        with pytest.raises(ArgumentError, match="takes 3 at once"):
            nc.compress(model, recipe="int8", data=pictures[:4])


# --- pruning --------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """A gated and a plain block as transformers have them: only their inner columns can go."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 96)
        self.down, self.inner, self.outer = nn.Linear(96, 32), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x + self.outer(F.gelu(self.inner(x)))


def test_feed_forward_columns_are_pruned():
    module = FeedForward().eval()
    with torch.no_grad():  # half of the inner columns hardly do anything
        module.outer.weight[:, ::2] *= 0.01
        module.down.weight[:, 1::2] *= 0.01
    exported = torch.export.export(module, (torch.randn(4, 32),), dynamic_shapes=({0: AUTO},))
    x = torch.randn(64, 32)
    data = [(torch.randn(256, 32),) for _ in range(6)]
    plan = nc.compress(Model(exported, "generic"), recipe="fp32", data=data, prune=0.45)
    kept = {s["channels"]: s["kept"] for s in plan.record["pruning"]["spaces"]}
    assert kept[96] < 96 and kept[128] < 128 and plan.record["pruning"]["share"] >= 0.45
    with torch.no_grad():
        expected = module(x)
    assert (nc.Executor(plan, device="cpu")(x) - expected).norm() < 0.1 * expected.norm()
