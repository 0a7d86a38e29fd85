"""Which backend is chosen and why, without a GPU: the registered implementations are called with CPU tensors."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
        dispatch.serving("kv_append", [torch.ones(1)])
    assert dispatch._forced.get() is None or dispatch._environment


def test_explain():
    text = nc.explain("quantize_int8", [[4, 64]], "sm_90")
    assert text.startswith("quantize_int8 on sm_90, few rows: ") and len(text.splitlines()) == 4
    with nc.backend("reference"):
        assert "reference (asked for)" in nc.explain("rope", [[1, 2, 3, 4]], "sm_80")
    for op in dispatch.ROOM_OF:
        assert op in nc.explain(op, [[2, 3, 4, 8]], "sm_80") and op in nc.explain(op)


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
