"""Plans on a device that captures, as far as the CPU can prove it: tape.py stands for CUDA's graphs, the rest is real."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import small_plans
from narrowcast import dispatch
from narrowcast.errors import ArgumentError
from narrowcast.graph import Graph, Plan
from narrowcast.runtime import Executor
from narrowcast.runtime.captured import CapturedProgram
from narrowcast.runtime.cuda_graphs import CudaGraphs, is_served, layouts
from narrowcast.runtime.executor import _without_weights
from narrowcast.runtime.trace import Shared, written_placeholders
from tape import Tape
from test_runtime import Cached, Mixed, exported

ops = torch.ops.narrowcast


def captured(source, tape=None, **options):
    """An executor whose programs are captured on a tape."""
    exe = Executor(source, device="cpu", threads=1, **options)
    exe.graphs = tape or Tape()
    return exe


@pytest.fixture(scope="module")
def mixed():
    module = Mixed().eval()
    return module, exported(module, torch.randint(0, 50, (2, 5)))


def ids_of(*shape):
    return torch.randint(0, 50, shape)


def check(exe, module, *inputs):
    with torch.no_grad():
        expected = module(*inputs)
    for out, wanted in zip(exe(*inputs), expected, strict=True):
        torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 17)])
def test_results_of_every_run(mixed, shape):
    module, graph = mixed
    exe = captured(graph)
    for run in range(5):
        check(exe, module, ids_of(*shape))
        assert exe.graphs.recordings == (run >= 1) and exe.graphs.launches == run
    assert exe.program(ids_of(*shape)).launches == 1


def test_shapes_have_graphs_of_their_own(mixed):
    module, graph = mixed
    exe = captured(graph)
    for _ in range(3):
        for shape in ((2, 5), (1, 9), (4, 4)):
            check(exe, module, ids_of(*shape))
    assert exe.graphs.recordings == 3 and exe.graphs.launches == 6


def test_inference_mode_may_come_and_go(mixed):
    module, graph = mixed
    for first in (True, False):
        for alone in ((), ("aten.gelu",)):
            exe = captured(graph, Tape(alone))
            for mode in (first, not first, first, not first):
                with torch.inference_mode(mode):
                    check(exe, module, ids_of(2, 9))
                    exe.profile(ids_of(2, 9), repeats=1, warmup=0)


def test_outputs_are_the_callers(mixed):
    _, graph = mixed
    exe = captured(graph)
    for _ in range(3):
        first = exe(torch.zeros(2, 5, dtype=torch.long))
        kept = [t.clone() for t in first]
        exe(torch.ones(2, 5, dtype=torch.long))
        assert all(torch.equal(a, b) for a, b in zip(first, kept))


class Counting(nn.Module):
    """Adds to what it is given: a run that is made twice, or not at all, shows."""

    def forward(self, state, x):
        state.add_(x)
        return state * 2 + x


def test_what_a_graph_writes_it_writes_once(seed):
    for alone in ((), ("aten.add_.Tensor",), ("aten.mul.Tensor",)):
        exe = captured(exported(Counting(), torch.zeros(3), torch.ones(3)), Tape(alone))
        state, total = torch.zeros(3), torch.zeros(3)
        for _ in range(6):
            x = torch.randn(3)
            total += x
            torch.testing.assert_close(exe(state, x), total * 2 + x)
            torch.testing.assert_close(state, total)


def test_a_program_belongs_to_the_addresses_it_writes():
    inputs = torch.zeros(2, 4, 3), torch.randn(3, 200_000), torch.randn(2, 2, 3)
    module = Cached()
    exe = captured(exported(module, *inputs))
    caches = [torch.zeros(2, 4, 3) for _ in range(2)]
    for _ in range(3):
        for cache in caches:
            large, x = torch.randn(3, 200_000), torch.randn(2, 2, 3)
            wanted = cache.clone()
            expected = module(wanted, large, x)
            torch.testing.assert_close(exe(cache, large, x), expected)
            assert torch.equal(cache, wanted)
    assert len(exe._programs) == 2 and exe.graphs.launches == 4
    with pytest.raises(ArgumentError, match="cache must be contiguous"):
        exe(torch.zeros(4, 2, 3).transpose(0, 1), *inputs[1:])
    with pytest.raises(ArgumentError, match="cache must be on cpu, since the graph writes to it, got meta"):
        exe(torch.zeros(2, 4, 3, device="meta"), *inputs[1:])


def test_a_program_keeps_nothing_that_the_caller_owns():
    inputs = torch.zeros(2, 4, 3), torch.randn(3, 8), torch.randn(2, 2, 3)
    exe = captured(exported(Cached(), *inputs))
    exe(*inputs)
    exe.graphs.launches = 0
    kept = weakref.ref(inputs[0])
    del inputs
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "alone, parts", [("dequantize_groups", 3), ("aten.gelu", 3), ("aten.linear", 3), ("aten.embedding", 2)]
)
def test_a_step_that_cannot_be_captured_runs_between_graphs(mixed, alone, parts):
    module, graph = mixed
    exe = captured(graph, Tape([alone]))
    for _ in range(4):
        check(exe, module, ids_of(3, 7))
    program = exe.program(ids_of(3, 7))
    assert program.launches == parts and exe.graphs.recordings == parts - 1
    explanation = exe.explain(ids_of(3, 7))
    assert [r.op for r in explanation.not_native] == [alone]
    assert explanation.not_native[0].backend == "eager (said to be alone)"
    assert f"({alone})" in str(explanation).splitlines()[-1]


def test_all_steps_alone_need_no_graph(mixed):
    module, graph = mixed
    tape = Tape([step.op for step in captured(graph).program(ids_of(2, 5)).steps])
    exe = captured(graph, tape)
    for _ in range(3):
        check(exe, module, ids_of(2, 5))
    assert tape.recordings == 0


def test_an_op_that_waits_is_found_in_the_first_run(mixed):
    module, graph = mixed
    exe = captured(graph, Tape(waiting=["aten.gelu"]))
    for _ in range(3):
        check(exe, module, ids_of(2, 5))
    (row,) = exe.explain(ids_of(2, 5)).not_native
    assert row.op == "aten.gelu" and row.backend == "eager (waits for the device)"
    assert exe.program(ids_of(2, 5)).launches == 3


def test_a_capture_that_fails_leaves_single_steps(mixed):
    module, graph = mixed
    exe = captured(graph, Tape(failing=["aten.gelu"]))
    check(exe, module, ids_of(2, 5))
    with pytest.warns(RuntimeWarning, match="a plan runs step by step, node gelu: "):
        check(exe, module, ids_of(2, 5))
    for _ in range(2):
        check(exe, module, ids_of(2, 5))
    assert exe.program(ids_of(2, 5)).launches is None and exe.graphs.recordings == 1
    rows = exe.explain(ids_of(2, 5)).not_native
    assert len(rows) == len(exe.program(ids_of(2, 5)).steps)
    assert all("capture failed: " in r.backend and "when stream is capturing" in r.backend for r in rows)


def test_an_error_of_an_op_names_its_node(mixed):
    _, graph = mixed
    exe = captured(graph)
    with pytest.raises((RuntimeError, IndexError), match="index out of range"):
        exe(torch.full((2, 5), 50))
    exe(torch.full((2, 5), 49))  # still usable


def test_programs_leave_in_lru_order_and_give_back_their_graphs(mixed):
    module, graph = mixed
    exe = captured(graph, max_programs=2)
    a, b, c = (ids_of(1, n) for n in (2, 3, 4))
    kept = exe.program(a)
    for _ in range(2):
        check(exe, module, a)
    assert kept.launches == 1
    exe.program(b)
    exe.program(c)
    assert len(exe._programs) == 2 and kept.launches is None
    check(exe, module, a)
    exe.run_program(kept, [a])  # who still holds one may use it
    assert kept.launches == 1


def test_a_graph_is_gone_with_its_program(mixed):
    _, graph = mixed
    exe = captured(graph, max_programs=1)
    for _ in range(2):
        exe(ids_of(1, 3))
    replay = weakref.ref(exe.program(ids_of(1, 3))._parts[0])
    exe(ids_of(1, 4))
    gc.collect()
    assert replay() is None


def test_explain_profile_and_memory(mixed):
    _, graph = mixed
    exe, ids = captured(graph), ids_of(2, 5)
    rows = exe.explain(ids)
    by_op = {r.op: r for r in rows.rows}
    assert by_op["dequantize_groups"].backend == "graph (the CPU's kernel)" and not rows.not_native
    assert by_op["aten.linear"].macs == 10 * 32 * 48 and by_op["aten.arange"].backend == "folded"
    profile = exe.profile(ids, repeats=2, warmup=1)
    assert [r.node for r in profile.rows] == [s.node.name for s in exe.program(ids).steps]
    found = exe.memory(ids)
    assert found["arena"] >= ids.nbytes and found["lower_bound"] > 0 and found["folded"] > 0
    assert found["programs"] == found["arena"] + found["folded"] == exe.program(ids).bytes


def test_plans_of_every_kind():
    for plan, inputs in (
        (small_plans.encoder_plan(), (torch.randint(0, 5, (2, 16)), torch.ones(2, 16, dtype=torch.long))),
        (small_plans.image_plan(), (torch.randn(2, 3, 8, 8),)),
    ):
        exe, plain = captured(plan), Executor(plan, device="cpu", threads=1)
        for _ in range(3):
            torch.testing.assert_close(exe(*inputs), plain(*inputs))
    texts = ["sun rain", "snow", "wind sun sun rain"]
    plan = small_plans.encoder_plan()
    exe = captured(plan)
    for _ in range(3):
        torch.testing.assert_close(exe.encode(texts), Executor(plan, device="cpu").encode(texts))


class Last(nn.Module):
    def forward(self, x):
        return x.relu(), x.sigmoid()


def test_a_result_of_the_last_step_alone():
    exe = captured(exported(Last(), torch.randn(4, 3)), Tape(["aten.sigmoid"]))
    for _ in range(4):
        check(exe, Last(), torch.randn(4, 3))


# What is asked of the dispatcher, and where weights lie


@pytest.fixture
def graphs():
    """CudaGraphs that has met no device: only what it decides."""
    found = object.__new__(CudaGraphs)
    found.device = torch.device("cuda", 0)
    return found


def program_of(module, *inputs):
    return CapturedProgram(Executor(exported(module, *inputs), device="cpu")._shared, inputs, Tape())


class Quantising(nn.Module):
    def forward(self, x):
        q, scale = ops.quantize_int8(x, 0, True)
        return ops.silu_mul(x, x.relu()) + scale[:, None], q


def test_what_is_captured_follows_the_dispatcher(graphs, monkeypatch):
    program = program_of(Quantising(), torch.randn(4, 64))
    steps = {step.op: step for step in program.steps}
    chosen = dispatch.Choice("triton", "the table")
    asked = []

    def serving(op, given, device):
        asked.append((op, device))
        assert given["x" if op == "quantize_int8" else "gate"].shape == (4, 64)
        return chosen

    monkeypatch.setattr(dispatch, "serving", serving)
    of = lambda op: graphs.backend_of(steps[op], program._given(steps[op]))  # noqa: E731
    assert of("silu_mul") == ("graph", "triton: the table")
    assert of("quantize_int8") == ("eager", "triton: strict waits for what it found")
    assert asked[0] == ("silu_mul", graphs.device)
    assert graphs.backend_of(steps["aten.relu"], {}) == ("graph", "runs as its ATen op")
    chosen = dispatch.Choice("reference", "unproven")
    assert of("silu_mul") == ("eager", "reference on copies on the CPU: unproven")


class Filters(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.same = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        y = ops.conv2d(x, self.filter, None, [1, 1], [1, 1])
        return ops.linear(y.permute(0, 2, 3, 1), self.same)


def test_filters_lie_as_the_kernels_read_them(monkeypatch):
    module = Filters().requires_grad_(False)
    exe = Executor(exported(module, torch.randn(2, 4, 6, 6)), device="cpu")
    nodes, device = exe._shared.nodes, torch.device("meta")
    for backend, found in (("triton", {"filter": torch.channels_last}), ("reference", {})):
        monkeypatch.setattr(dispatch, "serving", lambda *_, b=backend: dispatch.Choice(b, ""))
        formats = layouts(nodes, device)
        assert formats == found
        shared = Shared(nodes, exe._shared.weights, device, formats)
        filter = shared.weights["filter"]
        assert filter.is_contiguous(memory_format=found.get("filter", torch.contiguous_format))
        assert shared.metas["filter"].stride() == filter.stride() and shared.weights["same"].is_contiguous()


def test_weights_that_are_one_stay_one():
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    module[1].weight = module[0].weight
    graph = exported(module.requires_grad_(False), torch.randn(2, 8))
    names = [n.target for n in graph.graph.nodes if n.op == "get_attr"]
    weight = module[0].weight
    shared = Shared(graph.graph, dict.fromkeys(names, weight), torch.device("meta"))
    assert len({id(w) for w in shared.weights.values()}) == 1


def test_auto_takes_a_gpu_that_is_proven(monkeypatch):
    nodes, device = exported(Quantising(), torch.randn(4, 64)).graph, torch.device("cuda", 0)
    proven = {"silu_mul"}
    monkeypatch.setattr(dispatch, "_arch", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "available", lambda op: dict.fromkeys(dispatch.BACKENDS, ""))
    monkeypatch.setattr(dispatch, "proven", lambda op, backend, arch: op in proven and backend == "triton")
    assert not is_served(nodes, device)
    with dispatch.backend("triton"):
        assert is_served(nodes, device)
    proven.add("quantize_int8")
    assert is_served(nodes, device)
    with dispatch.backend("reference"):
        assert not is_served(nodes, device)
    assert is_served(exported(nn.Linear(4, 4), torch.randn(2, 4)).graph, device)  # all ATen's


class Masked(nn.Module):
    """Writes to a result of its own, which shares nothing with the input."""

    def forward(self, x, cache):
        y = x.relu()
        y[y > 1] = 0.5
        cache.view(-1)[2:4].copy_(x[0, :2])
        return y * 2


def test_an_input_is_written_where_memory_is_shared():
    x, cache = torch.randn(4, 8), torch.zeros(2, 4)
    nodes = exported(Masked(), x, cache, dynamic=False).graph
    assert {n.name for n in written_placeholders(nodes)} == {"cache"}


def test_a_device_holds_the_weights_alone():
    plan = small_plans.encoder_plan()
    kept = _without_weights(plan)
    assert isinstance(kept, Plan) and not kept.graph.weights and kept.kind == plan.kind and plan.graph.weights
    assert isinstance(_without_weights(plan.graph), Graph)
