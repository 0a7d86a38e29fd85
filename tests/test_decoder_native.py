"""The decoder contract end to end: an importer's graph, fused, in native steps, against recomputing."""

import pytest
import torch

from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.importers.llama import Decoder, DecoderConfig, export_decoder, rope_tables
from narrowcast.runtime import Executor

CONFIG = DecoderConfig(
    layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=80, context=160,
    norm_eps=1e-5, rope_theta=1e4, tied=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    module = Decoder(CONFIG).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3) if p.dim() > 1 else p.fill_(1.0)
        for buffer, table in zip((module.cos, module.sin), rope_tables(CONFIG)):
            buffer.copy_(table)
    exported = export_decoder(module, CONFIG.layers, CONFIG.kv_heads, CONFIG.head_dim, torch.float32)
    graph = Graph.from_exported(exported)
    return Plan(graph, "decoder", "fp32", config=CONFIG.as_dict())


def full(plan, ids):
    """Logits [S, V] by the plain interpreter, over fresh caches."""
    caches = [torch.zeros(1, CONFIG.kv_heads, len(ids), CONFIG.head_dim) for _ in range(2 * CONFIG.layers)]
    rows, start = torch.arange(len(ids)), torch.zeros(1, dtype=torch.int32)
    return plan.graph.run(torch.tensor([ids]), start, rows, *caches)[0]


def prompt(length):
    return torch.randint(0, CONFIG.vocab, (length,)).tolist()


def greedy(plan, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(full(plan, ids)[-1].argmax()))
    return ids[-count:]


@pytest.fixture(scope="module")
def exe(plan):
    fused = Plan(optimize(plan.graph)[0], "decoder", "fp32", config=plan.config)
    return Executor(fused, device="cpu", threads=1)


def test_logits_equal_the_interpreter(plan, exe):
    ids = torch.tensor([prompt(45), prompt(45)])
    for row, sequence in zip(exe.logits(ids), ids.tolist()):
        torch.testing.assert_close(row, full(plan, sequence), atol=1e-3, rtol=1e-3)


def test_batched_generation_equals_recomputing(plan, exe):
    prompts = [prompt(n) for n in (1, 23, 9)]
    got = [[], [], []]
    for i, token in exe.generate_ids(prompts, max_new_tokens=8):
        got[i].append(token)
    assert got == [greedy(plan, p, 8) for p in prompts]


def test_a_decode_step_is_native(exe):
    inputs = [
        torch.zeros(1, 1, dtype=torch.long),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1, dtype=torch.long),
    ]
    caches = [torch.zeros(1, heads, 128, size) for _, heads, size in exe.cache_layout()]
    report = exe.explain(*inputs, *caches)
    assert {r.op for r in report.not_native} == {"aten.embedding", "aten.add.Tensor", "aten.index_select"}
    native = {r.op for r in report.rows if r.backend.startswith("native")}
    assert native >= {"linear", "rms_norm", "rope", "kv_append", "attention_decode", "silu_mul"}
