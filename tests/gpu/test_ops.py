"""Every op on every backend that can run it here: drawn dtypes, layouts and odd sizes against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from device_cases import OPS, backends, cases, first_case, placed, refused_case, run, wrong
from fuzz.spec import mismatch
from narrowcast import dispatch

CASES = 48
PAIRS = [pytest.param(op.name, key, b, id=f"{key}-{b}") for key, op in OPS.items() for b in backends(op.name)]
COMPILED = [p for p in PAIRS if p.values[2] != "reference" and "." not in p.values[1]]
#: Those that refuse some of what is drawn: heads are never drawn too large.
LIMITED = [
    p for p in COMPILED
    if any("last size" not in str(limit) for limit in dispatch.limits(p.values[0]).get(p.values[2], ()))
]  # fmt: skip


@pytest.mark.parametrize("op, key, backend", PAIRS)
def test_agrees_with_the_reference(op, key, backend, seed):
    count = CASES if backend != "reference" else 6
    bad = [
        what for a in cases(OPS[key], count, seed, backend) if (what := wrong(OPS[key], a, "cuda", backend))
    ]
    assert not bad, f"{len(bad)} of {count} cases:\n" + "\n".join(bad[:5])


@pytest.mark.parametrize("op, key, backend", LIMITED)
def test_a_call_beyond_the_limits_is_refused_by_name(op, key, backend, seed):
    """Forced, it is an error that names the argument; by default the call goes to a backend that takes it."""
    spec = OPS[key]
    moved = placed(refused_case(spec, seed, backend), "cuda")
    with pytest.raises(RuntimeError, match=rf"{op}: backend must be one of .*, got {backend}: \w+ must be "):
        run(spec, moved, backend)
    choice = dispatch.serving(op, dispatch.bind(op, (), moved))
    assert choice.backend != backend and f"{backend}: " in choice.reason


def assert_right(op, results, wanted):
    for i, (got, want) in enumerate(zip(results, wanted, strict=True)):
        assert not (what := mismatch(got.cpu(), want)), f"result {i}: {what}"


@pytest.mark.parametrize("op, key, backend", COMPILED)
def test_compiles_without_graph_breaks(op, key, backend, seed):
    torch._dynamo.reset()
    spec, arguments = OPS[key], first_case(OPS[key], seed, backend)
    wanted, moved = spec.reference(arguments), placed(arguments, "cuda")
    call = getattr(torch.ops.narrowcast, op)
    with torch.no_grad():
        results = run_compiled(torch.compile(lambda a: call(**a), fullgraph=True), moved, backend)
    if spec.written:
        results = [moved[n] for n in spec.written if moved[n] is not None]
    assert_right(spec, [results] if isinstance(results, torch.Tensor) else results, wanted)


def run_compiled(function, arguments, backend):
    with dispatch.backend(backend):
        return function(arguments)


@pytest.mark.parametrize("op, key, backend", COMPILED)
def test_is_captured_in_a_graph_and_replayed_on_new_values(op, key, backend, seed):
    spec = OPS[key]
    arguments = first_case(spec, seed, backend)
    arguments.pop("strict", None)  # asks the device what it found, which a graph cannot wait for
    wanted, moved, kept = spec.reference(arguments), placed(arguments, "cuda"), placed(arguments, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(spec, moved, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(spec, moved, backend)
    for tensor in results:
        tensor.zero_()
    for name, value in kept.items():
        if isinstance(value, torch.Tensor):
            flat(moved[name]).copy_(flat(value))
    graph.replay()
    torch.cuda.synchronize()
    assert_right(spec, results, wanted)


def flat(t: torch.Tensor) -> torch.Tensor:
    """The storage of a tensor: a copy into overlapping elements is refused."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


@pytest.mark.parametrize("op, key, backend", COMPILED)
def test_runs_in_the_order_of_the_current_stream(op, key, backend, seed):
    spec, arguments = OPS[key], first_case(OPS[key], seed, backend)
    wanted, kept = spec.reference(arguments), placed(arguments, "cuda")
    run(spec, placed(arguments, "cuda"), backend)  # compiled by now
    moved = placed(arguments, "cuda")
    tensors = [n for n, v in moved.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for name in tensors:
        flat(moved[name]).zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms; work on another stream would see the zeros
        for name in tensors:
            flat(moved[name]).copy_(flat(kept[name]))
        results = run(spec, moved, backend)
    side.synchronize()
    assert_right(spec, results, wanted)
