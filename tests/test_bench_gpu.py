"""The GPU bench without a GPU: shapes by meta tensors, results and rows on the CPU at small sizes, floors by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import bench_gpu  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_harness  # noqa: E402
import gpu_plans  # noqa: E402
from conv_layers import Layer  # noqa: E402
from test_gpu_tools import gpu  # noqa: E402

FLOORS = gpu_harness.Floors(1e12, {"bf16": 1e15, "int8": 2e15})
HERE = bench_gpu.Device(torch.device("cpu"), "no GPU", "none", 1 << 14, FLOORS)
LAYERS = [
    Layer(16, 24, 3, 1, 1, 9, "relu"),
    Layer(16, 16, 5, 2, 16, 9, "relu6"),
    Layer(8, 16, 1, 1, 1, 7, "none"),
]
SMALL = [
    gpu_cases.linear(5, 24, 32),
    gpu_cases.linear_int8(17, 24, 64),
    gpu_cases.linear_dynamic_int8(17, 24, 64),
    gpu_cases.linear_grouped(3, 32, 256),
    gpu_cases.attention(2, 4, 2, 70, 16, True),
    gpu_cases.attention(2, 4, 4, 70, 16, False),
    gpu_cases.attention(1, 4, 2, 70, 32, True, int8=True),
    gpu_cases.attention_decode(3, 4, 2, 40, 16),
    gpu_cases.attention_decode(3, 4, 2, 40, 16, int8=True),
    *(gpu_cases.dequantize(kind, 20, 512) for kind in gpu_cases.KINDS),
    gpu_cases.quantize(18, 64),
    gpu_cases.norm(18, 64),
    *(gpu_cases.conv2d(layer, 2) for layer in LAYERS),
    *(gpu_cases.conv2d_int8(layer, 2) for layer in LAYERS),
]
FULL = [case for cases in gpu_cases.CASES.values() for case in cases()]


def named(cases):
    return [pytest.param(case, id=f"{case.op} {case.name}".replace(" ", "_")) for case in cases]


def without_grad(function):
    return torch.no_grad()(function)


@pytest.mark.parametrize("case", named(FULL))
def test_operands_of_the_full_size_fit_the_op(case):
    """On meta tensors: the op takes them, and the bytes of the floor are those of inputs and results."""
    inputs = case.make(gpu_harness.Draw("meta", 1))
    result = case.ours(**inputs)
    results = result if isinstance(result, (tuple, list)) else [result]
    tensors = [t for t in (*inputs.values(), *results) if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) == pytest.approx(case.moved, rel=0.01)
    assert case.part(case.value(result)).numel() > 0


def test_every_room_and_a_name_for_every_case():
    assert list(gpu_cases.CASES) == gpu.TIMED_ROOMS
    assert all(case.room == room for room, cases in gpu_cases.CASES.items() for case in cases())
    assert len({(case.op, case.dtype, case.name) for case in FULL}) == len(FULL)


@pytest.mark.parametrize("case", named(SMALL))
@without_grad
def test_a_case_is_right_and_so_are_its_peers(case, seed):
    rows = bench_gpu.rows_of(case, HERE, seed, 0.005)
    assert len(rows) == 1 and "state" not in rows[0], rows
    row = json.loads(json.dumps(rows[0], allow_nan=False))
    assert row["ours"] > 0 and row["seed"] == seed and row["uuid"] == "none" and row["floor"] > 0
    assert row["accuracy"]["relative error"] <= case.limit
    only_there = {"sdpa cudnn", "torch tinygemm int4", "triton, all integers"}  # these have no kernel here
    refused = {n for n, why in row["refused"].items() if n not in only_there}
    assert not refused, row["refused"]
    torchs = {p.name for p in case.peers if p.package is None} - only_there
    assert torchs <= set(row["peers"]) | only_there


@without_grad
def test_a_wrong_result_gets_no_time(seed):
    case = gpu_cases.linear(5, 24, 32)
    wrong = dataclasses.replace(case, ours=lambda x, w: case.ours(x, w) * 1.1)
    (row,) = bench_gpu.rows_of(wrong, HERE, seed, 0.005)
    assert (
        row["state"] == "failed"
        and "ours" not in row
        and row["reason"].startswith("wrong: relative error 0.")
    )
    infinite = dataclasses.replace(case, ours=lambda x, w: case.ours(x, w) * torch.inf)
    (row,) = bench_gpu.rows_of(infinite, HERE, seed, 0.005)
    assert row["state"] == "failed"


@without_grad
def test_a_peer_that_is_wrong_raises_or_lacks_its_package_stops_nobody(seed):
    def raises(inputs):
        raise ValueError("no such kernel\nsecond line")

    make = bench_gpu.gpu_peers.Peer
    others = [
        make("raises", raises), make("wrong", lambda i: lambda: i["x"][:, :24]),
        make("absent", raises, package="bitsandbytes"), *gpu_cases.peers.LINEAR,
    ]  # fmt: skip
    case = dataclasses.replace(gpu_cases.linear(5, 24, 32), peers=others)
    (row,) = bench_gpu.rows_of(case, HERE, seed, 0.005)
    assert list(row["peers"]) == ["torch linear bf16"]
    assert row["refused"]["raises"] == "ValueError: no such kernel"
    assert row["refused"]["wrong"].startswith("wrong: relative error")
    absent = bench_gpu.device_row(HERE, seed)["absent"]
    assert ("absent" in row["refused"]) == ("bitsandbytes" not in absent)


def test_floors_by_hand():
    assert FLOORS.of(2e9, {"bf16": 1e12}) == (2e-3, "memory")
    assert FLOORS.of(1e6, {"bf16": 1e12, "int8": 4e12}) == (pytest.approx(3e-3), "tensor cores")
    assert gpu_harness.Floors(1e12, {}).of(1e6, {"int8": 1e15}) == (1e-6, "memory")


def test_floors_are_measured_where_the_bench_runs(seed):
    floors = gpu_harness.measure_floors(torch.device("cpu"), seed, side=64, copied=1 << 16, seconds=0.02)
    assert floors.bandwidth > 0 and set(floors.peaks) == {"bf16", "int8"}


def test_sets_rotate_past_the_cache():
    cache = 50 << 20
    for size in (1 << 20, 8 << 20, 60 << 20, 1 << 30):
        count = gpu_harness.sets_for(size, cache)
        assert (count - 1) * size >= 2 * cache and count >= 2
    assert gpu_harness.sets_for(16, cache) == gpu_harness.MOST_SETS


def test_every_set_is_called_and_a_time_is_of_one_call():
    seen = []
    loops = {n: gpu_harness.Loop([lambda i=i: seen.append(i) for i in range(3)], HERE.device) for n in "ab"}
    times = gpu_harness.timed(loops, HERE.device, 0.001, 3)
    assert set(seen) == {0, 1, 2} and set(times) == {"a", "b"}
    assert 0 < times["a"] < 1e-3 and times["a"].spread >= 0


def test_operands_are_random_and_repeatable(seed):
    a, b = (gpu_harness.Draw("cpu", seed) for _ in range(2))
    assert torch.equal(a.normal(64), b.normal(64)) and not torch.equal(a.normal(64), a.normal(64))
    codes = a.codes(4096)
    assert codes.dtype == torch.int8 and codes.min() == -127 and codes.max() == 127


@without_grad
def test_the_budget_ends_a_run_and_names_what_is_left(monkeypatch, tmp_path, seed):
    monkeypatch.setitem(bench_gpu.ROOMS, "linear", lambda: [gpu_cases.linear(m, 24, 32) for m in (1, 2)])
    options = bench_gpu.arguments(["linear", "--budget", "-1", "--seed", str(seed)])
    rows = bench_gpu.run_all(options, HERE)
    assert [r.get("state") for r in rows] == [None, "not timed", "not timed"]
    options = bench_gpu.arguments(["linear", "--quick", "--seconds", "0.01", "--seed", str(seed)])
    rows = bench_gpu.run_all(options, HERE)
    assert not [r for r in rows if "state" in r]
    bench_gpu.write(rows, tmp_path / "rows.json")
    assert [r["room"] for r in json.loads((tmp_path / "rows.json").read_text())] == [
        "device",
        "linear",
        "linear",
    ]


def test_an_unknown_room_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_gpu.arguments(["liner"])
    assert "ROOM must be one of linear, " in capsys.readouterr().err


DECODER = dataclasses.replace(
    gpu_plans.SMOLLM2, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=256, tied=False
)  # fmt: skip


@pytest.mark.parametrize("recipe", ["bf16", "int4"])
@without_grad
def test_a_plan_is_timed_beside_torch(recipe, seed):
    (row,) = gpu_plans.rows_of(gpu_plans.decode(recipe, DECODER), HERE, seed, 0.005)
    row = json.loads(json.dumps(row, allow_nan=False))
    assert (
        row["room"] == "plans"
        and "random weights" in row["case"]
        and row["weights"] == f"random, seed {seed}"
    )
    assert row["ours"] > 0 and list(row["peers"]) == ["torch eager bf16"] and row["floor"] > 0
    assert row["accuracy"] == {"relative error to the CPU": 0.0} and row["launches"] is None


@without_grad
def test_the_decoder_in_torch_is_the_decoder_of_the_plan(seed):
    module = gpu_plans.random_decoder(DECODER, seed, torch.float32)
    executor = gpu_plans.on_cpu(gpu_plans.decoder_plan(module, "fp32"))
    steps, ids = gpu_plans.TorchSteps(module, torch.device("cpu"), 64), []
    for _ in range(9):
        ids.append(int(steps.ids))
        steps.launch()
    wanted = executor.logits(torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(steps.logits[0, 0], wanted, atol=1e-4, rtol=1e-4)
    assert int(steps.ids) == int(wanted.argmax()) and int(steps.position) == 9


@without_grad
def test_a_plan_that_is_wrong_or_absent_gets_no_time(seed):
    case = gpu_plans.decode("bf16", DECODER)
    (row,) = gpu_plans.rows_of(dataclasses.replace(case, limit=-1.0), HERE, seed, 0.005)
    assert row["state"] == "failed" and row["reason"].startswith("wrong: relative error 0 to the CPU")
    (row,) = gpu_plans.rows_of(dataclasses.replace(case, packages=("no_such_model",)), HERE, seed, 0.005)
    assert row["state"] == "absent" and row["reason"] == "not installed: no_such_model"


@without_grad
def test_plans_are_a_room_of_the_bench_and_a_stage(monkeypatch, seed):
    assert len({case.name for case in gpu_plans.cases()}) == len(gpu_plans.cases())
    monkeypatch.setitem(bench_gpu.ROOMS, "plans", lambda: [gpu_plans.decode("bf16", DECODER)])
    options = bench_gpu.arguments(["plans", "--seconds", "0.005", "--seed", str(seed)])
    assert [r["room"] for r in bench_gpu.run_all(options, HERE)] == ["device", "plans"]
    assert "plans" not in bench_gpu.arguments([]).rooms
    (part,) = gpu.parts_of("plans")
    assert part.command[2:4] == ["plans", "--budget"] and part.seconds <= gpu.STAGE_SECONDS


def test_stages_of_the_bench_fit_their_time():
    parts = gpu.parts_of("bench")
    budgets = [int(p.command[p.command.index("--budget") + 1]) for p in parts]
    assert [p.name for p in parts] == list(gpu.TIMED)
    assert sum(budgets) + 20 * len(parts) <= gpu.STAGE_SECONDS
    (alone,) = gpu.parts_of("attention")
    assert alone.name == "attention" and alone.seconds <= gpu.STAGE_SECONDS
    bench_gpu.arguments([w for w in alone.command[2:] if w != "{json}"] + ["rows.json"])


def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(ROOT / "bench/bench_gpu.py"), "norm"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (
        done.returncode == 1 and done.stdout == "bench_gpu: needs a CUDA device, and torch sees none here\n"
    )
