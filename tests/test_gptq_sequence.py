"""Layer after layer: each is rounded for what the rounded layers before it produce; a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrowcast as nc
from narrowcast.compress import sequential
from narrowcast.compress.sequential import round_in_sequence
from narrowcast.compress.transformer import int4_targets, quantize_grouped
from narrowcast.compress.work_folder import WorkFolder, fingerprint
from narrowcast.errors import ArgumentError
from narrowcast.graph import Graph
from narrowcast.graph.passes import optimize
from narrowcast.importers.model import Model

AUTO = torch.export.Dim.AUTO
WORDS = ["[UNK]", "sun", "rain", "snow", "wind", "cloud", "hail", "fog"]


class Encoder(nn.Module):
    """Word vectors, two gated blocks, the mean of the rows that count."""

    def __init__(self, width=64):
        super().__init__()
        self.table = nn.Embedding(len(WORDS), width)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(width, 96, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 96, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(96, width) for _ in range(2))

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        x = x + torch.cumsum(x, 1) * 0.3  # rows depend on each other
        for norm, gate, up, down in zip(self.norm, self.gate, self.up, self.down):
            y = norm(x)
            x = down(F.silu(gate(y)) * up(y)) + x
        mask = attention_mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * mask).sum(1) / mask.sum(1), dim=-1)


def encoder(seed=5) -> Model:
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(seed)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inputs = torch.randint(len(WORDS), (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    shapes = ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO})
    exported = torch.export.export(Encoder().eval().requires_grad_(False), inputs, dynamic_shapes=shapes)
    config = {"max_position_embeddings": 64, "hidden": 64}
    return Model(exported, "encoder", config, {"tokenizer.json": tokenizer.to_str().encode()})


def texts(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, size: torch.randint(n, (size,), generator=generator).tolist()  # noqa: E731
    return [" ".join(WORDS[1 + i] for i in draw(len(WORDS) - 1, 3 + draw(12, 1)[0])) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    return encoder()


@pytest.fixture
def graph(model):
    return optimize(Graph.from_exported(model.exported))[0]


def batches(count=4, rows=8, length=10):
    return [
        (torch.randint(1, len(WORDS), (rows, length)), torch.ones(rows, length, dtype=torch.int64))
        for _ in range(count)
    ]


def test_later_layers_make_up_for_earlier_ones(graph):
    targets = int4_targets(graph, 32, 16, set())
    assert len(targets) == 4
    train, test = batches(12), batches(3)
    rounded = round_in_sequence(graph, targets, train)
    error = lambda layers: output_error(graph, layers, test)  # noqa: E731
    assert error(rounded) < 0.5 * error({})


def output_error(graph, rounded, inputs) -> float:
    """Of the graph with these layers rounded, and the others to the nearest codes."""
    linear = torch.ops.narrowcast.linear.default
    copy = graph.clone()
    nodes = dict(zip(graph.calls(linear), copy.calls(linear)))
    quantize_grouped(copy, {}, 4, 32, 16, set(), rounded={nodes[n]: r for n, r in rounded.items()})
    return sum((copy.run(*x)[0] - graph.run(*x)[0]).square().sum().item() for x in inputs)


def test_few_rows_are_not_learnt_by_heart(graph, monkeypatch):
    targets, few = int4_targets(graph, 32, 8, set()), [batches(1, rows=2, length=20)[0]]
    called = []
    monkeypatch.setattr(sequential, "made_up", lambda h, m: called.append(1) or torch.zeros_like(m))
    round_in_sequence(graph, targets, few)  # 40 rows for 64 and 96 inputs
    assert not called
    round_in_sequence(graph, targets, batches(5, rows=8, length=10))  # 400
    assert len(called) == len(targets)


def test_made_up_is_the_least_squares_change():
    x, weight = torch.randn(600, 32), torch.randn(8, 32)
    aim = x @ weight.t() + 0.01 * torch.randn(600, 8)
    wrong = weight + 0.3 * torch.randn(8, 32)
    hessian, missing = x.t() @ x / 600, (aim - x @ wrong.t()).t() @ x / 600
    change = sequential.made_up(hessian, missing, ridge=0.01)
    assert (wrong + change - weight).norm() < 0.05 * (wrong - weight).norm()


def test_padding_does_not_count(graph):
    targets = int4_targets(graph, 32, 8, set())
    first = dict([next(iter(targets.items()))])
    ids, mask = batches(1)[0]
    mask[:, 6:] = 0
    short = round_in_sequence(graph, first, [(ids[:, :6], mask[:, :6])])
    padded = round_in_sequence(graph, first, [(ids, mask)], valid=lambda inputs: inputs[1].bool())
    for a, b in zip(short.values(), padded.values()):
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


def test_rows_that_are_not_finite_are_left_out_and_reported(graph):
    (table,) = (name for name in graph.weights if name.startswith("table"))
    graph.weights[table] = graph.weights[table].clone()
    graph.weights[table][0] = float("inf")
    ids, mask = batches(1)[0]
    ids[2, -1] = 0  # the last row of a sequence: none comes after it
    rounded = round_in_sequence(graph, int4_targets(graph, 32, 8, set()), [(ids, mask)])
    first = next(iter(rounded.values()))
    assert first.notes == ["1 of its input rows were not finite and were left out"]
    assert all(r.dequantize().isfinite().all() for r in rounded.values())


# --- through compress -----------------------------------------------------------------------------


def test_compress_int4(model, tmp_path):
    plan = nc.compress(model, recipe="int4", data=texts(60, 1))
    layers = [d for d in plan.record["layers"] if d["op"] == "linear_grouped"]
    assert len(layers) == 4 and all(d["precision"] == "int4" and d["damping"] == 0.01 for d in layers)
    assert all(d["sqnr_db"] > 12 for d in layers) and plan.certificate["loss"] < 0.02
    plan.save(tmp_path / "int4.plan")
    assert nc.verify(tmp_path / "int4.plan").ok


def test_a_layer_kept_in_float(model):
    plan = nc.compress(model, recipe="int4", data=texts(40, 1), keep_float=["down.0"])
    kept = {d["name"]: d["precision"] for d in plan.record["layers"]}
    assert kept["down.0"] == "float32" and sorted(kept.values()).count("int4") == 3
    with pytest.raises(ArgumentError, match=r"there is no 'down\.7'"):
        nc.compress(model, recipe="int4", data=texts(40, 1), keep_float=["down.7"])


def test_dead_inputs_reach_the_report(model):
    damaged = encoder()
    state = damaged.exported.state_dict
    for name in ("norm.0.weight", "norm.0.bias"):
        state[name].zero_()
    plan = nc.compress(damaged, recipe="int4", data=texts(40, 1))
    warned = [w for w in plan.record["warnings"] if "no calibration data reached it" in w]
    assert len(warned) == 2  # the gates of the first block see zeros, and so does the layer behind them


def test_a_damaged_weight_is_named():
    damaged = encoder()
    damaged.exported.state_dict["down.1.weight"][3, 2] = float("nan")
    with pytest.raises(ArgumentError, match=r"weight down\.1\.weight\S* holds NaN"):
        nc.compress(damaged, recipe="int4", data=texts(40, 1))


# --- a run that was cut short ---------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(count):
    def progress(what, done, total):
        if what == "rounding" and done == count:
            raise Stop

    return progress


def record(plan) -> str:
    return json.dumps(plan.record["layers"])


@pytest.mark.parametrize("finished", [1, 3, 4])
def test_goes_on_where_it_stopped(model, tmp_path, monkeypatch, finished):
    work, options = tmp_path / "work", {"recipe": "int4", "data": texts(40, 2)}
    whole = nc.compress(model, **options)
    with pytest.raises(Stop):
        nc.compress(model, **options, work=work, progress=stop_after(finished))
    assert len(list(work.glob("layer-*"))) == finished
    rounded = []
    monkeypatch.setattr(
        sequential, "round_weight", lambda *a, f=sequential.round_weight: rounded.append(1) or f(*a)
    )
    resumed = nc.compress(model, **options, work=work)
    assert len(rounded) == 4 - finished and not work.exists()
    assert record(resumed) == record(whole)
    assert all(torch.equal(w, resumed.graph.weights[name]) for name, w in whole.graph.weights.items())


def test_damaged_and_foreign_layers_are_made_anew(model, tmp_path):
    work, options = tmp_path / "work", {"recipe": "int4", "data": texts(40, 2)}
    whole = nc.compress(model, **options)
    with pytest.raises(Stop):
        nc.compress(model, **options, work=work, progress=stop_after(3))
    first, second, _ = sorted(work.glob("layer-*"))
    first.write_bytes(first.read_bytes()[:50])
    second.write_bytes(b"")
    (work / "mine.txt").write_text("keep me")
    resumed = nc.compress(model, **options, work=work)
    assert record(resumed) == record(whole)
    assert [p.name for p in work.iterdir()] == ["mine.txt"]

    with pytest.raises(Stop):
        nc.compress(model, recipe="int4", data=texts(40, 3), work=work, progress=stop_after(3))
    resumed = nc.compress(model, **options, work=work)  # other data: nothing is taken over
    assert record(resumed) == record(whole)


def test_a_work_folder_that_cannot_be_made(model, tmp_path):
    with pytest.raises(ArgumentError, match="cannot make the work folder"):
        nc.compress(model, recipe="int4", data=texts(40, 2), work=tmp_path / "no" / "where")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import narrowcast as nc
from test_gptq_sequence import encoder, texts
def progress(what, done, total):
    if what == "rounding" and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
nc.compress(encoder(), recipe="int4", data=texts(40, 2), work=sys.argv[1], progress=progress)
"""


def test_kill_9(model, tmp_path):
    work = tmp_path / "work"
    command = [sys.executable, "-c", KILLED, str(work), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(work.glob("layer-*"))) == 2
    resumed = nc.compress(encoder(), recipe="int4", data=texts(40, 2), work=work)
    whole = nc.compress(encoder(), recipe="int4", data=texts(40, 2))
    assert record(resumed) == record(whole)
    assert all(torch.equal(w, resumed.graph.weights[name]) for name, w in whole.graph.weights.items())


def test_fingerprint_sees_names_and_values():
    a = {"x": torch.ones(3), "y": torch.zeros(2)}
    assert fingerprint(a) == fingerprint({"y": torch.zeros(2), "x": torch.ones(3)})
    for other in ({"x": torch.ones(3), "z": torch.zeros(2)}, {"x": torch.ones(3) * 2, "y": torch.zeros(2)}):
        assert fingerprint(other) != fingerprint(a)


def test_a_work_folder_of_another_run_is_emptied(tmp_path):
    folder = tmp_path / "work"
    WorkFolder(folder, {"run": 1})
    (folder / "layer-00000.safetensors").write_bytes(b"x")
    WorkFolder(folder, {"run": 1})
    assert (folder / "layer-00000.safetensors").exists()
    WorkFolder(folder, {"run": 2})
    assert not (folder / "layer-00000.safetensors").exists()
