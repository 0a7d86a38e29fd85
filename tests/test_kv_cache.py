"""Narrow key/value caches of decoders: what they hold, what they cost, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import narrowcast as nc
from narrowcast.compress.calibrate import decoder_inputs
from narrowcast.compress.evaluation import float_plan
from narrowcast.compress.kv_cache import FIRST_TOKENS, common_keys, quantize_kv_cache
from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.importers import load_model
from small_plans import encoder_plan
from test_importers_gguf import tiny_llama


def gentle(metadata, tensors):
    """Heads of 32, and weights of the size that trained ones have: logits do not hang on a last digit."""
    metadata |= {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
    for name, (kind, sizes, raw) in tensors.items():
        if kind == 8:
            blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 34)
            blocks[:, :2] = torch.tensor([0.001], dtype=torch.float16).view(torch.uint8)
            tensors[name] = (kind, sizes, blocks.numpy().tobytes())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny_llama(tmp_path_factory.mktemp("llama") / "m.gguf", gentle))


def bytes_per_token(executor):
    return sum(heads * (size or 1) * dtype.itemsize for dtype, heads, size in executor.cache_layout())


@pytest.mark.parametrize("kind, bound, size", [("int8", 0.02, 4 * 36), ("int4", 0.25, 4 * 20)])
def test_a_narrow_cache(model, tmp_path, kind, bound, size):
    # Of 20 models the worst lost 0.01 and 0.12.
    plan = nc.compress(model, recipe="fp32", kv_cache=kind)
    assert plan.record["kv_cache"] == kind and ("k_shift_0" in plan.graph.weights) == (kind == "int4")
    plan.save(tmp_path / "m.plan")
    executor = nc.load(tmp_path / "m.plan", device="cpu", threads=1)
    assert bytes_per_token(executor) == size
    ids = torch.randint(0, 257, (2, 30))
    expected = nc.Executor(float_plan(model), device="cpu", threads=1).logits(ids)
    got = executor.logits(ids)
    assert float((got - expected).norm() / expected.norm()) < bound
    # Token by token it reads what it wrote: the same logits.
    steps = list(executor.generate_ids(ids[0].tolist(), max_new_tokens=3, eos=[]))
    whole = executor.logits(torch.tensor([[*ids[0].tolist(), *steps]]))[0, 29:32]
    assert whole.argmax(-1).tolist() == steps


def test_what_keys_have_in_common(model):
    graph = float_plan(model).graph
    inputs = decoder_inputs(graph, torch.randint(0, 257, (2, 20)))
    shifts = common_keys(graph, [inputs])
    assert not inputs[3].any()  # the caller's caches stay empty
    filled = [t.clone() for t in inputs]
    graph.run(*filled)
    for i, shift in enumerate(shifts):
        assert torch.allclose(shift, filled[3 + 2 * i][:, :, FIRST_TOKENS:].mean((0, 2)), atol=1e-5)


def test_what_no_cache_is_narrowed_for(model, tmp_path):
    small = load_model(tiny_llama(tmp_path / "small.gguf"))
    with pytest.raises(UnsupportedError, match="for heads of 16"):
        nc.compress(small, recipe="fp32", kv_cache="int4")
    with pytest.raises(ArgumentError, match="this graph has no key/value cache"):
        quantize_kv_cache(encoder_plan().graph, "int4")
    with pytest.raises(ArgumentError, match="kv_cache must be float, int8 or int4"):
        nc.compress(model, kv_cache="int2")
