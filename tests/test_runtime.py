import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.runtime import Executor, memory
from narrowcast.runtime.threads import cgroup_cpus

ops = torch.ops.narrowcast


class Mixed(nn.Module):
    """Native and ATen nodes, views of every kind, several outputs, sizes from the input."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layer = nn.Linear(32, 48)
        self.register_buffer("packed", torch.randint(0, 256, (24, 24), dtype=torch.uint8))
        self.register_buffer("scale", torch.randn(24, 3))

    def forward(self, ids):
        x = self.embedding(ids)
        h = F.gelu(self.layer(x))
        left, right = h.split(24, dim=-1)
        w = ops.dequantize_groups(self.packed, self.scale, None, 16, 4)
        y = (left * torch.sigmoid(right)) @ w[:, :24].t()
        y = y.transpose(0, 1).reshape(-1, 24) + torch.arange(24)
        top, where = y.max(dim=-1)
        return y, top.unsqueeze(1).expand(-1, 3), where, x.permute(2, 0, 1)[1:3], ids + ids.shape[1]


def exported(module, *inputs, dynamic=True):
    shapes = tuple(dict.fromkeys(range(t.dim()), Dim.AUTO) if dynamic else {} for t in inputs)
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    return program.module(check_guards=False)


@pytest.fixture(scope="module")
def mixed():
    module = Mixed()
    return module, exported(module, torch.randint(0, 50, (2, 5)))


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 17), (2, 5)])
def test_results_equal_the_module(mixed, shape):
    module, graph = mixed
    exe = Executor(graph, device="cpu")
    ids = torch.randint(0, 50, shape)
    for _ in range(2):
        program = exe.program(ids)
        program.arena_tensor.fill_(0xFF)  # whatever is not written first shows up
        for out, expected in zip(exe(ids), module(ids)):
            torch.testing.assert_close(out, expected)
        ids = torch.randint(0, 50, shape)


def test_inference_mode_may_come_and_go(mixed):
    module, graph = mixed
    for first in (True, False):
        exe = Executor(graph, device="cpu")
        for mode in (first, not first, first):
            ids = torch.randint(0, 50, (2, 9))
            with torch.inference_mode(mode):
                results = exe(ids)
                exe.profile(ids, repeats=1, warmup=0)
            for out, expected in zip(results, module(ids)):
                torch.testing.assert_close(out, expected)


def test_outputs_are_the_callers(mixed):
    _, graph = mixed
    exe = Executor(graph, device="cpu")
    first = exe(torch.zeros(2, 5, dtype=torch.long))
    kept = [t.clone() for t in first]
    exe(torch.ones(2, 5, dtype=torch.long))
    assert all(torch.equal(a, b) for a, b in zip(first, kept))


def test_memory_is_known_and_tight(mixed):
    _, graph = mixed
    exe = Executor(graph, device="cpu")
    ids = torch.randint(0, 50, (3, 17))
    report, program = exe.memory(ids), exe.program(ids)
    assert report["lower_bound"] <= report["arena"] <= 1.25 * report["lower_bound"]
    assert report["arena"] + memory.ALIGNMENT - 1 == program.arena_tensor.numel()
    assert report["weights"] == sum(t.nbytes for t in graph.state_dict().values())
    memory.verify(program.intervals, program.arena)


def test_explain_names_every_node(mixed):
    _, graph = mixed
    rows = Executor(graph, device="cpu").explain(torch.randint(0, 50, (2, 5)))
    by_op = {r.op: r for r in rows.rows}
    assert by_op["dequantize_groups"].backend.startswith("native")
    assert by_op["aten.linear"].backend == "callback (runs as its ATen op)"
    assert by_op["aten.linear"].macs == 10 * 32 * 48 and by_op["aten.linear"].weights == "float32"
    assert by_op["aten.linear"].source
    assert by_op["aten.arange"].backend == "folded" and by_op["aten.transpose.int"].backend == "view"
    assert len(rows.rows) == sum(n.op == "call_function" for n in graph.graph.nodes)
    assert rows.shares == {"float32": 1.0} and "aten.gelu" in str(rows)
    assert {r.op for r in rows.not_native} >= {"aten.linear", "aten.gelu"}
    assert rows.as_dict()["nodes"][0]["node"]


def test_profile_times_every_step(mixed):
    _, graph = mixed
    exe = Executor(graph, device="cpu")
    ids = torch.randint(0, 50, (2, 5))
    profile = exe.profile(ids, repeats=3)
    assert [r.node for r in profile.rows] == [s.node.name for s in exe.program(ids).steps]
    assert profile.ms > 0 and abs(sum(r.share for r in profile.rows) - 1) < 1e-6
    assert abs(sum(profile.by_op().values()) - profile.ms) < 1e-9 and "GMAC/s" in str(profile)


def test_programs_leave_in_lru_order(mixed):
    _, graph = mixed
    exe = Executor(graph, device="cpu", max_programs=2)
    a, b, c = (torch.zeros(1, n, dtype=torch.long) for n in (2, 3, 4))
    kept = exe.program(a)
    exe.program(b)
    assert exe.program(a) is kept
    exe.program(c)
    assert exe.program(a) is kept and len(exe._programs) == 2
    exe.max_bytes = 1
    exe.program(b)
    assert len(exe._programs) == 1


class Cached(nn.Module):
    def forward(self, cache, large, x):
        cache[:, 1:3].copy_(x)
        return large.mean(dim=-1) + cache.sum()


def test_written_and_large_inputs_are_used_in_place():
    inputs = torch.zeros(2, 4, 3), torch.randn(3, 200_000), torch.randn(2, 2, 3)
    module = Cached()
    graph = exported(module, *inputs)
    exe = Executor(graph, device="cpu")
    for _ in range(3):  # new addresses: the steps that read them are made again
        cache, large, x = torch.zeros(2, 4, 3), torch.randn(3, 200_000), torch.randn(2, 2, 3)
        expected_cache = cache.clone()
        expected = module(expected_cache, large, x)
        torch.testing.assert_close(exe(cache, large, x), expected)
        assert torch.equal(cache, expected_cache)
    assert [b.kind for b in exe.program(cache, large, x).buffers[:3]] == ["bound", "bound", "input"]
    strided = torch.randn(200_000, 3).t()
    torch.testing.assert_close(exe(cache, strided, x), module(cache.clone(), strided, x))


def test_written_input_must_be_contiguous():
    inputs = torch.zeros(2, 4, 3), torch.randn(3, 8), torch.randn(2, 2, 3)
    exe = Executor(exported(Cached(), *inputs), device="cpu")
    with pytest.raises(ArgumentError, match="cache must be contiguous"):
        exe(torch.zeros(4, 2, 3).transpose(0, 1), *inputs[1:])


def test_calls_from_threads_are_serialised(mixed):
    module, graph = mixed
    exe = Executor(graph, device="cpu", threads=1)
    failures = []

    def work(length):
        for _ in range(20):
            ids = torch.randint(0, 50, (2, length))
            if not torch.allclose(exe(ids)[0], module(ids)[0], atol=1e-5):
                failures.append(length)

    workers = [threading.Thread(target=work, args=(n,)) for n in (3, 3, 4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not failures


def test_thread_count_is_restored(mixed):
    _, graph = mixed
    before = torch.get_num_threads()
    exe = Executor(graph, device="cpu", threads=before + 1)
    seen = []
    exe.program(torch.zeros(2, 5, dtype=torch.long)).loop.add_callback(
        "spy", lambda: seen.append(torch.get_num_threads())
    )
    exe(torch.zeros(2, 5, dtype=torch.long))
    assert seen == [before + 1] and torch.get_num_threads() == before


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cgroup_quota(tmp_path, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_cpus(tmp_path) == cpus


def test_a_failing_step_names_its_node(mixed):
    _, graph = mixed
    exe = Executor(graph, device="cpu")
    with pytest.raises(RuntimeError, match="node embedding: index out of range") as caught:
        exe(torch.full((2, 5), 50))
    assert isinstance(caught.value.__cause__, IndexError)
    exe(torch.full((2, 5), 49))  # still usable


class Bad(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("packed", torch.zeros(4, 8, dtype=torch.uint8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x + ops.dequantize_groups(self.packed, self.scale, None, 8, 8)


def test_an_operand_that_no_step_takes_is_an_error_at_the_node():
    graph = exported(Bad(torch.ones(4, 1)), torch.ones(4, 8))
    graph.scale = torch.ones(3, 1)
    with pytest.raises(RuntimeError, match=r"node dequantize_groups: .*scale must be"):
        Executor(graph, device="cpu")(torch.ones(4, 8))


def test_arguments_are_checked(mixed):
    _, graph = mixed
    exe = Executor(graph, device="cpu")
    with pytest.raises(ArgumentError, match="inputs must be 1 tensors"):
        exe()
    with pytest.raises(ArgumentError, match=r"ids must be int64 \[\*, \*\], got float32 \[3\]"):
        exe(torch.zeros(3))
    with pytest.raises(ArgumentError, match="ids must be a tensor"):
        exe([1])
    with pytest.raises(ArgumentError, match="threads must be"):
        Executor(graph, threads=0)
    with pytest.raises(ArgumentError, match="device must be"):
        Executor(graph, device="tpu")
    with pytest.raises(ArgumentError, match="source must be"):
        Executor(3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the error on machines without CUDA")
def test_explicit_cuda_needs_a_device(mixed):
    _, graph = mixed
    with pytest.raises(UnsupportedError, match="cuda"):
        Executor(graph, device="cuda")


class Rows(nn.Module):
    def forward(self, x):
        return x[x[:, 0] > 0]


def test_a_weight_in_any_order_of_dimensions_gets_a_step():
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            codes = torch.randint(-127, 128, (24, 8, 3, 3), dtype=torch.int8)
            self.register_buffer("codes", codes.to(memory_format=torch.channels_last))
            self.register_buffer("scale", torch.rand(24))

        def forward(self, x):
            x = x.to(memory_format=torch.channels_last)
            return ops.conv2d_int8(x, 0.1, 0, self.codes, self.scale, None)

    module, x = Filter(), torch.randint(-127, 128, (2, 8, 6, 6), dtype=torch.int8)
    exe = Executor(exported(module, x, dynamic=False))
    torch.testing.assert_close(exe(x), module(x), rtol=0, atol=0)
    (row,) = [r for r in exe.explain(x).rows if r.op == "conv2d_int8"]
    assert row.backend.startswith("native")


def test_shapes_that_depend_on_values_are_refused():
    graph = exported(Rows(), torch.randn(4, 3))
    with pytest.raises(UnsupportedError, match="its shape cannot be known before the run"):
        Executor(graph, device="cpu")(torch.randn(4, 3))


def test_empty_batch():
    exe = Executor(exported(nn.Linear(3, 2), torch.randn(4, 3)), device="cpu")
    assert exe(torch.zeros(0, 3)).shape == (0, 2)
