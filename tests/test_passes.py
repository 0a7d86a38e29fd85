"""Each fusion: the same numbers after it, and the calls it promises."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.formats import GroupedWeight
from narrowcast.graph import Graph
from narrowcast.graph.passes import Pass, optimize, run_passes
from narrowcast.graph.passes.fold import share_equal_calls
from tolerances import assert_close

ops = torch.ops.narrowcast
aten = torch.ops.aten
AUTO = torch.export.Dim.AUTO


def fuse(module: nn.Module, *inputs: torch.Tensor, dynamic: bool = True, tolerance: float = 1e-5) -> Graph:
    """The fused graph of a module, its result equal to the module's at the exported and at another size."""
    module = module.eval()
    shapes = tuple({0: AUTO} for _ in inputs) if dynamic else None
    graph = Graph.from_exported(torch.export.export(module, inputs, dynamic_shapes=shapes))
    fused, _ = optimize(graph)
    cases = [inputs]
    if dynamic:
        cases.append(tuple(torch.cat([x, x.flip(0)]) for x in inputs))
    for case in cases:
        with torch.no_grad():
            expected = module(*case)
        for ours, reference in zip(
            fused.run(*case), expected if isinstance(expected, tuple) else (expected,)
        ):
            assert_close(ours, reference.double(), tolerance)
    return fused


def count(graph: Graph, *targets) -> int:
    return len(list(graph.calls(*targets)))


class Lambda(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x, y=None):
        return self.function(self, x) if y is None else self.function(self, x, y)


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "hardswish", "relu6"])
def test_linear_and_activation(name):
    graph = fuse(Lambda(lambda m, x: getattr(F, name)(m.a(x)), a=nn.Linear(8, 12)), torch.randn(3, 8))
    assert count(graph) == 1
    assert next(graph.calls(ops.linear.default)).kwargs["activation"] == name


def test_matmul_with_a_transposed_parameter():
    module = Lambda(lambda m, x: x @ m.w.t() + m.b)
    module.w, module.b = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5))
    graph = fuse(module, torch.randn(3, 8))
    assert count(graph, ops.linear.default) == 1


def test_residual_and_post_activation():
    module = Lambda(lambda m, x: F.relu(m.b(F.gelu(m.a(x))) + x), a=nn.Linear(8, 16), b=nn.Linear(16, 8))
    graph = fuse(module, torch.randn(3, 8))
    assert count(graph) == 2
    last = list(graph.calls(ops.linear.default))[-1]
    assert last.kwargs["post_activation"] == "relu" and last.kwargs["residual"].op == "placeholder"


def test_two_layers_summed_take_turns():
    module = Lambda(lambda m, x: m.a(x) + m.b(F.silu(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    graph = fuse(module, torch.randn(3, 8))
    assert count(graph, aten.add.Tensor) == 0 and count(graph, ops.linear.default) == 2


def test_qkv_and_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
            self.o = nn.Linear(32, 32, bias=False)

        def forward(self, x, mask):
            batch, length, _ = x.shape
            q, k, v = (f(x).view(batch, length, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            k, v = (t[:, :, None].expand(batch, 2, 2, length, 8).reshape(batch, 4, length, 8) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
            return self.o(y.transpose(1, 2).reshape(batch, length, -1)) + x

    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    graph = fuse(Attention(), torch.randn(2, 6, 32), mask)
    assert count(graph, ops.linear.default) == 2 and count(graph, ops.attention.default) == 1
    assert count(graph, aten.expand.default) == 0
    assert "q+k+v.weight" in graph.weights


def test_gate_up_merge():
    module = Lambda(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(8, 16, bias=False),
        up=nn.Linear(8, 16, bias=False),
        down=nn.Linear(16, 8, bias=False),
    )
    graph = fuse(module, torch.randn(3, 8))
    assert count(graph, ops.linear.default) == 2 and count(graph, ops.silu_mul.default) == 1


@pytest.mark.parametrize("bits", [(4, 4), (4, 8)])
def test_merged_layers_keep_the_form_of_the_file(bits):
    module = Lambda(lambda m, x: m.q(x) + m.k(x).sin())
    module.q, module.k = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
    native = {
        f"{name}.weight": GroupedWeight(
            b, 32, torch.randint(0, 256, (8, 8 * b), dtype=torch.uint8), torch.randn(8, 2), torch.randn(8, 2)
        )
        for name, b in zip("qk", bits)
    }
    for name, form in native.items():
        module.get_parameter(name).data = form.dequantize()
    exported = torch.export.export(module, (torch.randn(3, 64),))
    graph, _ = optimize(Graph.from_exported(exported, native))
    assert len(graph.native) == count(graph, ops.linear.default) == (1 if bits[0] == bits[1] else 2)
    for name, form in graph.native.items():
        assert torch.equal(form.dequantize(), graph.weights[name])


def test_norms():
    class RmsNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16))

        def forward(self, x):
            dtype = x.dtype
            x = x.to(torch.float32)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * x.to(dtype)

    module = Lambda(lambda m, x, y: m.b(m.a(x) + m.r(y)), a=nn.LayerNorm(16), r=RmsNorm(), b=nn.LayerNorm(16))
    graph = fuse(module, torch.randn(3, 16), torch.randn(3, 16))
    assert count(graph, ops.rms_norm.default) == 1 and count(graph, ops.layer_norm.default) == 1
    assert count(graph, ops.add_layer_norm.default) == 1
    assert {n.target for n in graph.calls()} <= {
        ops.rms_norm.default, ops.layer_norm.default, ops.add_layer_norm.default, operator.getitem
    }  # fmt: skip


def test_rope():
    class Rope(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, 1, 0.25)))

        def forward(self, x, positions):
            angles = positions[:, :, None].float() * self.frequencies
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            half = x.shape[-1] // 2
            rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
            return x * cos + rotated * sin

    graph = fuse(Rope(), torch.randn(2, 3, 5, 8), torch.randint(0, 100, (2, 5)))
    assert count(graph) == 1 and count(graph, ops.rope.default) == 1
    exported = torch.export.export(Rope(), (torch.randn(2, 3, 5, 8), torch.zeros(2, 5, dtype=torch.int64)))
    longer, _ = optimize(Graph.from_exported(exported), positions=100)
    assert longer.weights["rope.cos"].shape == (100, 4)


def test_convolution_batch_norm_residual_activation():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.n = nn.BatchNorm2d(8)
            self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.n.running_mean.normal_()
            self.n.running_var.uniform_(0.5, 2)

        def forward(self, x):
            return F.relu(self.d(F.relu6(self.n(self.a(x)))) + x)

    graph = fuse(Block(), torch.randn(2, 8, 6, 6))
    first, second = graph.calls(ops.conv2d.default)
    assert count(graph) == 2
    assert first.kwargs == {"activation": "relu6"}
    assert second.kwargs["post_activation"] == "relu"


def test_constants_are_folded_and_equal_calls_shared():
    module = Lambda(lambda m, x: torch.sin(x) * m.w.exp() + torch.sin(x))
    module.w = nn.Parameter(torch.randn(4))
    graph = fuse(module, torch.randn(3, 4))
    assert count(graph, aten.exp.default) == 0 and count(graph, aten.sin.default) == 1


@pytest.mark.parametrize(
    "target, formula",
    [
        (aten.silu.default, lambda x: x * torch.sigmoid(x)),
        (aten.gelu.default, lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        (aten.gelu.default, lambda x: 0.5 * (x * (torch.erf(x * math.sqrt(0.5)) + 1))),
        (
            aten.gelu.default,
            lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
        ),
        (
            aten.gelu.default,
            lambda x: x * (1 + torch.tanh((x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi))) * 0.5,
        ),
        (aten.hardswish.default, lambda x: x * F.relu6(x + 3) / 6),
        (aten.hardswish.default, lambda x: x * torch.clamp(x + 3, 0, 6) * (1 / 6)),
        (aten.hardswish.default, lambda x: F.hardsigmoid(x) * x),
    ],
)
def test_activations_written_as_formulas(target, formula):
    graph = fuse(Lambda(lambda m, x: formula(torch.sin(x))), torch.randn(7, 9))
    assert [node.target for node in graph.calls()] == [aten.sin.default, target]


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x * torch.sigmoid(2 * x),
        lambda x: x * 0.6 * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * F.relu6(x + 2) / 6,
        lambda x: 0.5 * x * (1 + torch.tanh(0.9 * (x + 0.044715 * torch.pow(x, 3)))),
    ],
)
def test_other_formulas_stay(formula):
    graph = fuse(Lambda(lambda m, x: formula(torch.sin(x))), torch.randn(7, 9))
    assert count(graph) >= 4


@pytest.mark.parametrize("form", ["squares", "variance", "rsqrt"])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_written_out(form, affine):
    def forward(m, x):
        centred = x - x.mean(-1, keepdim=True)
        if form == "squares":
            y = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        elif form == "variance":
            y = centred / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        else:
            y = torch.rsqrt((centred * centred).mean(dim=2, keepdim=True) + 1e-5) * centred
        return y * m.weight + m.bias if affine else y

    module = Lambda(forward)
    module.weight, module.bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))
    graph = fuse(module, torch.randn(3, 4, 16))
    assert [node.target for node in graph.calls()] == [ops.layer_norm.default]
    assert (next(graph.calls()).args[1] is not None) == affine


@pytest.mark.parametrize(
    "scale",
    [
        lambda m, y: m.weight.float() * y,
        lambda m, y: m.weight * y.half(),
        lambda m, y: (1 + m.weight.float()) * y,
    ],
)
def test_rms_norm_in_half_precision(scale):
    def forward(m, x):
        y = x.float()
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)
        return scale(m, y).half()

    module = Lambda(forward)
    module.weight = nn.Parameter(torch.randn(16).half())
    graph = fuse(module, torch.randn(3, 16).half(), tolerance=2e-3)
    assert [node.target for node in graph.calls()] == [ops.rms_norm.default]


@pytest.mark.parametrize("masks", ["before", "after", "two"])
def test_attention_written_out(masks):
    def forward(m, x, mask):
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (m.q, m.k, m.v))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8)
        mask = mask[:, None, None]
        scores = mask + scores if masks == "before" else scores + mask
        if masks == "two":
            scores = scores + m.relative[:, : x.shape[1], : x.shape[1]]
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    module = Lambda(forward, q=nn.Linear(32, 32), k=nn.Linear(32, 32), v=nn.Linear(32, 32))
    module.relative = nn.Parameter(torch.randn(4, 9, 9))
    graph = fuse(module, torch.randn(2, 5, 32), torch.randn(2, 5))
    assert count(graph, ops.attention.default) == 1 and count(graph, aten.matmul.default) == 0


def test_constants_join_the_bias():
    module = Lambda(
        lambda m, x: m.c(F.relu(m.a(x) + m.add)) + m.per_channel, c=nn.Conv2d(4, 6, 1, bias=False)
    )
    module.a = nn.Linear(8, 8)
    module.add, module.per_channel = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(6, 1, 1))
    graph = fuse(module, torch.randn(2, 4, 8, 8))
    assert [n.target for n in graph.calls()] == [ops.linear.default, ops.conv2d.default]


def test_padding_joins_the_convolution():
    module = Lambda(lambda m, x: m.c(F.pad(x, (2, 2, 1, 1))), c=nn.Conv2d(4, 6, 3, padding=1))
    graph = fuse(module, torch.randn(2, 4, 8, 8))
    assert [n.target for n in graph.calls()] == [ops.conv2d.default]
    assert next(graph.calls()).args[4] == [2, 3]


def test_uneven_padding_joins_the_convolution():
    """TensorFlow's "same" with stride 2 pads at the end only."""
    module = Lambda(lambda m, x: m.c(F.pad(x, (0, 1, 2, 3))), c=nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)))
    graph = fuse(module, torch.randn(2, 4, 8, 9))
    assert [n.target for n in graph.calls()] == [ops.conv2d.default]
    assert next(graph.calls()).args[4] == [3, 0, 4, 1]  # top, left, bottom, right


@pytest.mark.parametrize("sides, value", [((0, -1, 0, 0), 0.0), ((1, 1, 1, 1), 2.0)])
def test_other_padding_stays(sides, value):
    module = Lambda(lambda m, x: m.c(F.pad(x, sides, value=value)), c=nn.Conv2d(4, 6, 3))
    assert count(fuse(module, torch.randn(2, 4, 8, 8)), aten.pad.default) == 1


def test_a_layer_between_views_takes_what_follows():
    def forward(m, x):
        y = torch.addmm(m.bias, x.view(-1, x.size(-1)), m.weight).view(*x.shape[:-1], 12)
        return F.gelu(y)

    module = Lambda(forward)
    module.weight, module.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12))
    graph = fuse(module, torch.randn(2, 3, 8))
    assert [n.target for n in graph.calls() if n.target is not aten.sym_size.int] == [ops.linear.default]


def test_a_layer_with_an_activation_is_not_merged():
    module = Lambda(lambda m, x: (m.q(x), m.k(x), F.gelu(m.f(x))))
    module.q, module.k, module.f = (nn.Linear(8, 8) for _ in range(3))
    graph = fuse(module, torch.randn(3, 8))
    assert count(graph, ops.linear.default) == 2 and count(graph, aten.gelu.default) == 0


def test_a_norm_shared_by_two_sums():
    module = Lambda(lambda m, x, y: m.n(torch.sin(m.n(torch.sin(x) + y)) + y), n=nn.LayerNorm(8))
    graph = fuse(module, torch.randn(3, 8), torch.randn(3, 8))
    assert count(graph, ops.add_layer_norm.default) == 2


def test_a_batch_norm_over_another_dimension_stays():
    module = Lambda(lambda m, x: m.n(m.a(x)), a=nn.Linear(8, 8), n=nn.BatchNorm1d(8))
    module.n.running_mean.normal_()
    graph = fuse(module, torch.randn(3, 8, 8))
    assert count(graph) == 2
    assert count(fuse(module, torch.randn(3, 8))) == 1


def test_a_copy_before_a_view_may_go():
    graph = fuse(Lambda(lambda m, x: x.transpose(0, 1).contiguous().view(-1)), torch.randn(3, 4))
    assert count(graph, aten.clone.default, aten.contiguous.default) == 0


def test_reads_around_a_cache_write_stay_apart():
    nodes = torch.fx.Graph()
    k_cache, v_cache, k, start = (nodes.placeholder(n) for n in ("k_cache", "v_cache", "k", "start"))
    row = nodes.call_function(aten.select.int, (k_cache, 2, 0))
    before = nodes.call_function(aten.sum.default, (row,))
    nodes.call_function(ops.kv_append.default, (k_cache, v_cache, k, k, start))
    row = nodes.call_function(aten.select.int, (k_cache, 2, 0))
    after = nodes.call_function(aten.sum.default, (row,))
    nodes.output((before, after))
    graph = Graph(nodes, {})
    share_equal_calls(graph)
    assert count(graph, aten.sum.default) == 2 and count(graph, ops.kv_append.default) == 1


def test_report_says_what_and_where():
    module = Lambda(lambda m, x: F.relu(m.first(x)), first=nn.Linear(8, 12))
    graph = Graph.from_exported(torch.export.export(module, (torch.randn(3, 8),)))
    _, report = optimize(graph)
    assert str(report) == "to_linear 1, fuse_activation 1"
    assert report.places["to_linear"] == report.places["fuse_activation"] == ["first"]


def test_order_is_checked():
    graph = Graph.from_exported(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)))
    with pytest.raises(ValueError, match="needs layers first"):
        run_passes(graph, [Pass(lambda g: 0, requires=frozenset({"layers"}))])
