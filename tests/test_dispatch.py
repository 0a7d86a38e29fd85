"""Which backend is chosen and why, without a GPU: the registered implementations are called with CPU tensors."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import device_cases
import narrowcast as nc
from narrowcast import _register_cuda, dispatch
from narrowcast.kernels.common import tuning

ops = torch.ops.narrowcast
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
OVERLOADS = [
    (op, overload)
    for op in dispatch.ROOM_OF
    for overload in getattr(ops, op).overloads()
    if op not in dispatch.EVERYWHERE
]


@pytest.fixture
def proofs(monkeypatch):
    """Sets the rows of proven.json: (op, backend, arch)."""

    def set_rows(*rows, sources=dispatch.source_hash):
        written = [
            {"op": o, "backend": b, "arch": a, "sources": sources(o, b) or "unknown"} for o, b, a in rows
        ]
        monkeypatch.setattr(dispatch, "_proofs", lambda: written)
        dispatch.proven.cache_clear()
        dispatch.choose.cache_clear()

    yield set_rows
    monkeypatch.undo()
    dispatch.proven.cache_clear()
    dispatch.choose.cache_clear()


@pytest.fixture
def both(monkeypatch):
    """As if the op existed in Triton and as a compiled kernel."""
    monkeypatch.setattr(dispatch, "available", lambda op: dict.fromkeys(dispatch.BACKENDS, ""))


@pytest.mark.parametrize("op, overload", OVERLOADS)
def test_every_op_of_the_catalogue_takes_cuda_tensors(op, overload):
    name = f"narrowcast::{op}" + ("" if overload == "default" else f".{overload}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_triton_functions_have_the_arguments_of_their_schema():
    """Read from the source, so that it holds where triton is not installed."""
    found = 0
    for op in dispatch.ROOM_OF:
        module = dispatch.triton_module(op)
        if module is None:
            continue
        room, stem = module.split(".")[-2:]
        source = (dispatch._folder(room) / f"{stem}.py").read_text()
        (function,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == op]
        arguments = getattr(ops, op).default._schema.arguments
        assert [a.arg for a in function.args.args] == [a.name for a in arguments if not a.kwarg_only], op
        assert [a.arg for a in function.args.kwonlyargs] == [a.name for a in arguments if a.kwarg_only], op
        assert ast.parse(source).body[0].value.value, f"{stem} has no docstring"
        found += 1
    assert found


def test_proofs_name_what_exists_and_are_not_void():
    for row in json.loads((Path(dispatch.__file__).parent / "proven.json").read_text()):
        assert row["op"] in dispatch.ROOM_OF and row["backend"] in ("triton", "cuda")
        assert row["sources"] == dispatch.source_hash(row["op"], row["backend"]), (
            f"{row['op']}, {row['backend']}: its kernels changed after the proof; remove the row"
        )


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import narrowcast; print(narrowcast.explain('quantize_int8', [[4, 64]], 'sm_90'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout


def test_unproven_backends_are_not_chosen(proofs, both):
    proofs()
    choice = dispatch.choose("linear_int8", "sm_90", "many", None)
    assert choice.backend == "reference" and "passed no tests on sm_90" in choice.reason
    proofs(("linear_int8", "cuda", "sm_90"))
    assert dispatch.choose("linear_int8", "sm_90", "many", None).backend == "cuda"
    assert dispatch.choose("linear_int8", "sm_80", "many", None).backend == "reference"


def test_table_and_measurement(proofs, both):
    proofs(*(("linear_int8", b, a) for b in ("cuda", "triton") for a in ("sm_80", "sm_90")))
    assert dispatch.choose("linear_int8", "sm_90", "many", None).backend == "triton"
    assert dispatch.choose("linear_int8", "sm_90", "few", None).backend == "cuda"
    assert dispatch.choose("linear_int8", "sm_80", "many", None).backend == "cuda"
    assert dispatch.choose("linear_int8", "sm_80", "many", None, "triton").backend == "triton"
    assert dispatch.choose("linear_int8", "sm_90", "few", None, "nonsense").backend == "cuda"


def test_changed_sources_void_a_proof(proofs, both):
    row = ("quantize_int8", "triton", "sm_90")
    proofs(row)
    assert dispatch.proven(*row)
    proofs(row, sources=lambda op, backend: "of an older kernel")
    assert not dispatch.proven(*row)


def test_a_proof_covers_what_the_kernels_import(monkeypatch):
    """linear_int8 quantises by the kernels of quantize, and both round by the shared ones."""
    seen = []
    imported = dispatch._imported
    monkeypatch.setattr(
        dispatch, "_imported", lambda path, root: seen.append(path.name) or imported(path, root)
    )
    assert dispatch.source_hash("linear_dynamic_int8", "triton") != dispatch.source_hash("rope", "triton")
    assert {"linear_int8_triton.py", "quantize_triton.py", "triton_util.py", "checks.py"} <= set(seen)
    seen.clear()
    assert dispatch.source_hash("quantize_int8", "cuda")
    assert {"quantize_sm80.cu", "quantize_cuda.cu", "ptx.cuh", "quantize.h"} <= set(seen), seen


def test_table_names_rooms():
    assert {room for room, _, _ in dispatch.ORDER} <= set(dispatch.ROOM_OF.values())
    assert {b for order in dispatch.ORDER.values() for b in order} <= set(dispatch.BACKENDS)


def test_unknown_names():
    with pytest.raises(nc.ArgumentError, match="backend must be reference, triton or cuda, got 'rocm'"):
        nc.backend("rocm").__enter__()
    with pytest.raises(nc.ArgumentError, match="op must be one of the catalogue"):
        nc.explain("linear_int9")
    with pytest.raises(nc.ArgumentError, match="arch must be such as sm_90"):
        nc.explain("linear_int8", [[1, 8]], "hopper")
    done = subprocess.run(
        [sys.executable, "-c", "import narrowcast"],
        capture_output=True,
        text=True,
        env={"NARROWCAST_BACKEND": "gpu", "PATH": ""},
    )
    assert "NARROWCAST_BACKEND must be reference, triton or cuda, got 'gpu'" in done.stderr


def test_forced_backend_that_is_missing():
    with (
        nc.backend("cuda"),
        pytest.raises(RuntimeError, match=r"kv_append: backend must be one of .*, got cuda"),
    ):
        dispatch.serving("kv_append", {"k_cache": torch.ones(1)})
    assert dispatch._forced.get() is None or dispatch._environment


def test_explain():
    text = nc.explain("quantize_int8", [[4, 64]], "sm_90")
    assert text.startswith("quantize_int8 on sm_90, few rows: ") and len(text.splitlines()) == 4
    with nc.backend("reference"):
        assert "reference (asked for)" in nc.explain("rope", [[1, 2, 3, 4]], "sm_80")
    for op in dispatch.ROOM_OF:
        assert op in nc.explain(op, [[2, 3, 4, 8]], "sm_80") and op in nc.explain(op)


# Limits


@pytest.fixture
def on_sm_90(monkeypatch, proofs, both):
    """As if tensors lay on a GPU whose backends are all proven and which nothing was measured on."""
    proofs(*((op, b, "sm_90") for op in dispatch.ROOM_OF for b in ("cuda", "triton")))
    monkeypatch.setattr(dispatch, "_arch", lambda device: "sm_90")
    measured = {}
    monkeypatch.setattr(tuning, "table", lambda index: measured)
    return measured


def call(op, *arguments, **options):
    return dispatch.bind(op, arguments, options)


def heads(dtype, size=64):
    return [torch.empty(1, 4, 32, size, dtype=dtype, device="meta") for _ in range(3)]


def test_limits_name_arguments_of_their_ops():
    declared = 0
    for op in dispatch.ROOM_OF:
        names = {a.name for a in getattr(ops, op).default._schema.arguments}
        for backend, limits in dispatch.limits(op).items():
            assert backend in ("cuda", "triton") and limits
            assert {limit.argument for limit in limits} <= names, op
            declared += len(limits)
    assert declared


@pytest.mark.parametrize("op", ["attention", "attention_lse", "attention_int8"])
def test_a_call_beyond_a_backend_goes_to_the_next(op, on_sm_90):
    for dtype, many, few in (("float16", "triton", "cuda"), ("float32", "triton", "triton")):
        q, k, v = heads(getattr(torch, dtype))
        assert dispatch.serving(op, call(op, q, k, v)).backend == many
        choice = dispatch.serving(op, call(op, q[:, :, :1], k, v))
        assert choice.backend == few
        refused = "cuda: q must be float16 or bfloat16, got float32" in choice.reason
        assert refused == (dtype == "float32")
    choice = dispatch.serving(op, call(op, *heads(torch.float16, 512)))
    assert (
        choice.backend == "reference"
        and "triton: q must be at most 256 in its last size, got 512" in choice.reason
    )


def test_limits_of_other_rooms(on_sm_90):
    q, cache, other, codes = (
        torch.empty(1, 2, 8, 64, dtype=t) for t in (torch.float16, torch.float16, torch.bfloat16, torch.int8)
    )
    lengths = torch.ones(1, dtype=torch.int32)
    for k, backend in ((cache, "cuda"), (codes, "cuda"), (other, "triton"), (cache.float(), "triton")):
        given = call("attention_decode", q[:, :, :1], k, k, lengths)
        assert dispatch.serving("attention_decode", given).backend == backend
    grouped = torch.empty(1, 64), torch.empty(8, 32, dtype=torch.uint8), torch.empty(8, 2), None, 32, 4
    for bits, backend in ((16, "cuda"), (8, "triton"), (32, "reference")):
        choice = dispatch.serving("linear_grouped", call("linear_grouped", *grouped, activation_bits=bits))
        assert choice.backend == backend, choice
    refused = r"linear_grouped: backend must be one of .*, got cuda: activation_bits must be 16, got 8"
    with nc.backend("cuda"), pytest.raises(RuntimeError, match=refused):
        dispatch.serving("linear_grouped", call("linear_grouped", *grouped, activation_bits=8))


def test_a_measured_backend_is_used_where_it_takes_the_call(on_sm_90):
    q, k, v = heads(torch.float32)
    for dtype in ("float32", "float16"):
        on_sm_90[dispatch._key("attention", "many", [getattr(torch, dtype)] * 3)] = "cuda"
    assert dispatch.serving("attention", call("attention", q, k, v)).backend == "triton"
    half = dispatch.serving("attention", call("attention", q.half(), k.half(), v.half()))
    assert half.backend == "cuda" and "when measured" in half.reason


def test_what_was_measured_of_changed_kernels_does_not_count(monkeypatch):
    before = dispatch._key("rms_norm", "few", [torch.float32])
    monkeypatch.setattr(dispatch, "source_hash", lambda op, backend: "of other bytes")
    dispatch._kernels.cache_clear()
    assert dispatch._key("rms_norm", "few", [torch.float32]) != before
    dispatch._kernels.cache_clear()


def test_wider_limits_void_a_proof(monkeypatch):
    before = dispatch.source_hash("attention", "cuda"), dispatch.source_hash("attention", "triton")
    declared = {**dispatch.limits("attention"), "cuda": ()}
    monkeypatch.setattr(dispatch, "limits", lambda op: declared)
    after = dispatch.source_hash("attention", "cuda"), dispatch.source_hash("attention", "triton")
    assert before[0] != after[0] and before[1] == after[1]


def test_explain_tells_limits(on_sm_90):
    shapes = [[1, 4, 1, 64]] * 3
    text = nc.explain("attention", shapes, "sm_90")
    assert "few rows: cuda (" in text and "cuda: can run; q must be float16 or bfloat16; " in text
    text = nc.explain("attention", shapes, "sm_90", dtypes=[torch.float32] * 3)
    assert "few rows: triton (" in text and "\n  cuda: q must be float16 or bfloat16, got float32" in text
    text = nc.explain("linear_grouped", [[1, 64]], "sm_90", dtypes=["float16"], activation_bits=8)
    assert "few rows: triton (" in text and "cuda: activation_bits must be 16, got 8" in text
    with pytest.raises(nc.ArgumentError, match="linear_grouped must be explained by arguments of its own"):
        nc.explain("linear_grouped", [[1, 64]], "sm_90", bit=8)


@pytest.mark.parametrize("op", ["attention", "attention_decode.out", "linear_grouped"])
def test_cases_are_drawn_within_the_limits(op, seed):
    spec = device_cases.OPS[op]
    drawn = list(device_cases.cases(spec, 12, seed, "cuda"))
    assert len(drawn) == 12 and all(device_cases.takes(spec, a, "cuda") for a in drawn)
    assert not device_cases.takes(spec, device_cases.refused_case(spec, seed, "cuda"), "cuda")
    assert device_cases.takes(spec, device_cases.first_case(spec, seed, "cuda"), "cuda")


def test_shape_classes():
    assert dispatch.shape_class("linear_int8", (1, 16, 4096)) == "few"
    assert dispatch.shape_class("linear_int8", (17, 4096)) == "many"
    assert dispatch.shape_class("conv2d", (1, 512, 4, 4)) == "few"
    assert dispatch.shape_class("quantize_int8", ()) == "few"


def test_reference_is_the_cpu_kernel():
    x, w = torch.randn(3, 64), torch.randn(64)
    with nc.backend("reference"):
        assert torch.equal(ops.rms_norm.default.redispatch(CUDA, x, w, 1e-5), ops.rms_norm(x, w, 1e-5))
        q, scale = ops.quantize_int8.default.redispatch(CUDA, x, group_size=32)
        assert torch.equal(q, ops.quantize_int8(x, 32)[0]) and scale.shape == (3, 2)
        out = torch.full((3, 64), torch.nan)
        ops.rms_norm.out.redispatch(CUDA, x, w, 1e-5, out=out)
        assert torch.equal(out, ops.rms_norm(x, w, 1e-5))
        with pytest.raises(
            RuntimeError, match=r"rms_norm: out must be float32 \[3, 64\] on cpu, got float32 \[2"
        ):
            ops.rms_norm.out.redispatch(CUDA, x, w, 1e-5, out=out[:2])
        half = torch.empty(3, 5, dtype=torch.float16)
        ops.linear.out.redispatch(CUDA, x, torch.randn(5, 64), out=half)
        assert half.isfinite().all()


def test_reference_writes_what_the_op_writes():
    k, v, start = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.tensor([1], dtype=torch.int32)
    caches = [[torch.zeros(1, 2, 6, 8) for _ in range(2)] for _ in range(2)]
    ops.kv_append(*caches[0], k, v, start)
    with nc.backend("reference"):
        assert ops.kv_append.default.redispatch(CUDA, *caches[1], k, v, start) is None
    assert all(map(torch.equal, *caches)) and caches[0][0].any()


def test_compiled_kernels_get_their_arguments_by_name(monkeypatch):
    """The private op's schema, with a stand-in for its kernel."""
    seen = []

    class Private:
        _schema = ops._quantize_int8_cuda.default._schema

        def __call__(self, x, group_size, findings):
            seen.append((group_size, findings.tolist()))
            findings += torch.tensor([1, 1])
            return ops.quantize_int8(x, group_size)

    monkeypatch.setattr(ops._quantize_int8_cuda, "default", Private())
    call = _register_cuda._compiled("quantize_int8")
    x = torch.randn(2, 64)
    assert torch.equal(call(x, 32)[0], ops.quantize_int8(x, 32)[0]) and seen[0][0] == 32
    with pytest.raises(RuntimeError, match="quantize_int8: x must be finite"):
        call(x, group_size=0, strict=True)
    from narrowcast.kernels.quantize import nan_count

    assert nan_count(reset=True) >= 2


def test_tuning_table_survives_damage(tmp_path):
    path = tmp_path / "deep" / "gpu.json"
    table = tuning.Table(path)
    table.put("a", "1")
    tuning.Table(path).put("b", "2")
    table.put("c", "3")
    assert tuning.Table(path).entries == {"a": "1", "b": "2", "c": "3"}
    for damage in ("{", "[]", '{"a": 1}'):
        path.write_text(damage)
        assert tuning.Table(path).get("a") is None
    assert tuning.choose("key", ["first", "second"], None, torch.device("cpu")) == "first"
