"""Attention between quantised layers runs in bfloat16, and only there."""

import pytest
import torch
from torch import nn

import narrowcast
from narrowcast.compress.half_attention import narrow_attention
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.runtime import Executor

ops = torch.ops.narrowcast
WIDTH, HEADS = 64, 4
AUTO = torch.export.Dim.AUTO


class Block(nn.Module):
    """Self-attention between two int8 layers; ``use``: what else is done with a part of it."""

    def __init__(self, use: str = ""):
        super().__init__()
        self.use = use
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
        for name, rows in (("inner", 3 * WIDTH), ("outer", WIDTH)):
            codes = torch.randint(-127, 128, (rows, WIDTH), generator=generator, dtype=torch.int8)
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scale", torch.rand(rows, generator=generator) / 500)

    def forward(self, x):
        b, s = x.shape[:2]
        y = ops.linear_dynamic_int8(x, self.inner, self.inner_scale)
        parts = (y[..., i * WIDTH : (i + 1) * WIDTH] for i in range(3))
        q, k, v = (p.reshape(b, s, HEADS, -1).transpose(1, 2) for p in parts)
        out = ops.attention(q, k, v).transpose(1, 2).reshape(b, s, WIDTH)
        if self.use == "result":
            return out + ops.linear_dynamic_int8(out, self.outer, self.outer_scale)
        residual = {"query": y[..., :WIDTH], "residual": out}.get(self.use, x)
        return ops.linear_dynamic_int8(out, self.outer, self.outer_scale, None, "none", residual)


def graph_of(module: nn.Module, x: torch.Tensor) -> Graph:
    exported = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: AUTO, 1: AUTO},))
    return optimize(Graph.from_exported(exported))[0]


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 7), (3, 33)])
def test_narrowed(batch, length):
    x = torch.randn(batch, length, WIDTH)
    graph = graph_of(Block(), torch.randn(2, 9, WIDTH))
    expected = graph.run(x)[0]
    assert narrow_attention(graph) == 1
    (node,) = graph.calls(ops.attention.default)
    seen = {}
    graph.run(x, observe=lambda n, args, kwargs, result: seen.update({n: result}))
    assert seen[node].dtype is torch.bfloat16 and node.meta["val"].dtype is torch.bfloat16
    got = Executor(Plan(graph, "generic", "int8"))(x)
    got = got[0] if isinstance(got, tuple) else got
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, graph.run(x)[0], rtol=0.02, atol=0.02)
    # Rounding to 8 bits of mantissa, then int8 codes that may fall to the neighbour.
    assert (got - expected).norm() < 0.02 * (expected - x).norm()


@pytest.mark.parametrize("use", ["query", "residual", "result"])
def test_another_use_keeps_float32(use):
    x = torch.randn(2, 9, WIDTH)
    graph = graph_of(Block(use), x)
    expected = graph.run(x)[0]
    assert narrow_attention(graph) == 0
    torch.testing.assert_close(graph.run(x)[0], expected, rtol=0, atol=0)


def test_float_layers_are_left_alone():
    class Float(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            return ops.attention(q, q, q)

    graph = graph_of(Float(), torch.randn(2, 9, WIDTH))
    assert narrow_attention(graph) == 0


def test_a_decoder_keeps_its_caches_in_bfloat16(tmp_path):
    """The smallest Llama, from a Hugging Face folder: its caches, its plan file, its tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    from narrowcast.importers.model import load_model

    model = load_model(tmp_path / "llama")
    graph, _ = optimize(Graph.from_exported(model.exported, model.native))
    from narrowcast.compress.transformer import quantize_int8

    quantize_int8(graph, {}, 32, set())
    wide = Executor(Plan(graph.clone(), "decoder", "int8", config=model.config))
    assert narrow_attention(graph) == 2
    Plan(graph, "decoder", "int8", config=model.config).save(tmp_path / "half.plan")
    half = narrowcast.load(tmp_path / "half.plan", device="cpu")
    assert {dtype for dtype, _, _ in half.cache_layout()} == {torch.bfloat16}
    ids = torch.randint(0, 96, (2, 24))
    expected, got = wide.logits(ids), half.logits(ids)
    assert (got - expected).norm() < 0.03 * expected.norm()
    assert len(list(half.generate_ids(ids[0].tolist(), max_new_tokens=8))) == 8
