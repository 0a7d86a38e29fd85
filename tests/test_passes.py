"""Each fusion: the same numbers after it, and the calls it promises."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.graph import Graph
from narrowcast.graph.passes import Pass, optimize, run_passes
from tolerances import assert_close

ops = torch.ops.narrowcast
aten = torch.ops.aten
AUTO = torch.export.Dim.AUTO


def fuse(module: nn.Module, *inputs: torch.Tensor, dynamic: bool = True) -> Graph:
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
            assert_close(ours, reference.double(), 1e-5)
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


def test_order_is_checked():
    graph = Graph.from_exported(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)))
    with pytest.raises(ValueError, match="needs layers first"):
        run_passes(graph, [Pass(lambda g: 0, requires=frozenset({"layers"}))])
