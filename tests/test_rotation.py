"""Turned hidden states: the matrices are orthogonal, the function is the same, and a recipe takes the better plan."""

from __future__ import annotations

import pytest
import torch

import narrowcast as nc
from narrowcast.compress import rotation
from narrowcast.compress.calibrate import decoder_inputs
from narrowcast.compress.rotation import BACK, INTO, hadamard, orthogonal, rotate
from narrowcast.errors import UnsupportedError
from narrowcast.graph import Graph, Plan
from narrowcast.graph.passes import optimize
from narrowcast.importers import load_model
from small_plans import encoder_plan
from test_importers_gguf import tiny_llama

ops = torch.ops.narrowcast
TEXT = "a tiny model counts its words, one after another, and says none of them twice. " * 12


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 64, 76, 128, 140, 576])
def test_hadamard(size):
    """Sylvester, both of Paley's constructions and their products; 576 = 72 * 8 is SmolLM2's width."""
    matrix = hadamard(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 10, 92, 100, 576])
def test_orthogonal_of_any_size(size, seed):
    q = orthogonal(size, seed)
    torch.testing.assert_close(q @ q.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert size % 2 or hadamard(size) is not None or int((q != 0).sum(1).max()) == size & -size
    assert size < 10 or not torch.equal(q, orthogonal(size, seed + 1))  # 3: one of eight, all signs


def test_no_size_is_claimed_wrongly():
    assert hadamard(92) is None and hadamard(6) is None and hadamard(3) is None


def graph_of(source):
    model = load_model(source)
    return model, optimize(Graph.from_exported(model.exported, model.native))[0]


def logits(graph, ids):
    return graph.run(*decoder_inputs(graph, ids))[0]


@pytest.mark.parametrize("tied", [False, True])
def test_the_function_is_preserved(tmp_path, tied, seed):
    model, graph = graph_of(tiny_llama(tmp_path / "tiny.gguf", tied=tied))
    turned = graph.clone()
    added = rotate(turned, seed)
    assert added == ([INTO, BACK] if tied else [])
    ids = torch.randint(0, model.config["vocab"], (1, 13))
    expected = logits(graph, ids)
    # Turned weights are rounded anew, once: what such a rounding makes of these logits is the measure.
    rounded = graph.clone()
    for name, w in graph.weights.items():
        if w.is_floating_point() and w.dim() == 2:
            rounded.weights[name] = w + w.abs().amax() * 2**-24 * torch.randn(w.shape)
    noise = (logits(rounded, ids) - expected).norm()
    assert (logits(turned, ids) - expected).norm() < 16 * noise < 1e-3 * expected.norm()
    # Every product of the decoder has other weights, but for a table that the output shares.
    same = [n for n, w in turned.weights.items() if n in graph.weights and torch.equal(w, graph.weights[n])]
    assert [n for n in same if turned.weights[n].dim() == 2 and "layers" in n] == []
    norms = list(turned.calls(ops.rms_norm.default))
    ones = [bool((turned.weight(n.args[1]) == 1).all()) for n in norms]
    assert ones.count(True) == len(norms) - tied


def test_a_turned_graph_generates_as_before(tmp_path):
    """Step by step through the cache, whose values are turned as well."""
    model, graph = graph_of(tiny_llama(tmp_path / "tiny.gguf"))
    turned = graph.clone()
    rotate(turned)
    plans = [Plan(g, "decoder", "fp32", config=model.config, assets=model.assets) for g in (graph, turned)]
    for plan in plans:
        plan.graph.native = {}
    a, b = (list(nc.Executor(p, device="cpu").generate_ids([5, 9, 2], max_new_tokens=12)) for p in plans)
    assert a == b


def test_outlier_channels_are_spread(tmp_path):
    """What rotation is for: a hidden state with one large channel becomes one with none."""
    x = torch.randn(50, 64, dtype=torch.float64)
    x[:, 7] *= 40
    turned = x @ orthogonal(64, 3)
    peak = lambda t: (t.abs().amax(1) / t.square().mean(1).sqrt()).mean()  # noqa: E731
    assert peak(turned) < 0.5 * peak(x)


@pytest.mark.parametrize("used", [False, True])
def test_the_recipe_takes_the_better_plan(tmp_path, monkeypatch, used):
    source = tiny_llama(tmp_path / "tiny.gguf", tied=True, layers=1)
    real = rotation.better

    def judged(plain, other):
        plain.certificate["loss"], other.certificate["loss"] = 0.2, 0.1 if used else 0.3
        return real(plain, other)

    monkeypatch.setattr(rotation, "better", judged)
    plan = nc.compress(source, recipe="int8", data=TEXT, rotate=True)
    assert plan.record["rotation"] == {"used": used, "loss_without": 0.2, "loss_with": 0.1 if used else 0.3}
    rows = {d["name"]: d for d in plan.record["layers"]}
    assert ({INTO, BACK} <= set(rows)) == used
    if used:
        assert rows[INTO]["precision"] == "float32" and rows[INTO]["why"] == "it turns the hidden states"
    plan.save(tmp_path / "turned.plan")
    assert nc.Plan.load(tmp_path / "turned.plan").record == plan.record


def test_what_cannot_be_turned_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="one embedding table"):
        rotate(Graph(torch.fx.Graph(), {}))
    _, graph = graph_of(tiny_llama(tmp_path / "tiny.gguf"))
    before = dict(graph.weights)
    node = next(graph.calls(ops.rms_norm.default))
    other = graph.add_call(torch.ops.aten.relu.default, (node.args[0],), like=node)
    other.meta["val"] = node.args[0].meta["val"]
    node.args = (other, *node.args[1:])
    with pytest.raises(UnsupportedError, match="through relu"):
        rotate(graph)
    assert all(graph.weights[n] is w for n, w in before.items())
    with pytest.raises(UnsupportedError, match="of kind encoder"):
        rotation.turned("encoder", encoder_plan().graph, 0)
