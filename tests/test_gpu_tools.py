"""What runs on a GPU elsewhere, as far as this machine can prove it: the stages, the cases, the table of proofs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from device_cases import OPS, cases, first_case, placed, wrong
from narrowcast import dispatch

ROOT = Path(__file__).parents[1]


def load(name: str):
    """A script of tools/, whose name a package of the tests may have too."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu, verified = load("gpu"), load("verified")


def test_dry_run_lists_every_stage_and_room():
    command = [sys.executable, str(ROOT / "tools/gpu.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stages = {line.split()[0] for line in done.stdout.splitlines()}
    assert stages == set(gpu.STAGES)
    assert set(dispatch.ROOMS) <= {line.split()[1] for line in done.stdout.splitlines()}


def test_an_unknown_stage_is_refused():
    command = [sys.executable, str(ROOT / "tools/gpu.py"), "corectness"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "STAGE must be one of" in done.stderr


def test_a_part_that_fails_or_hangs_hides_no_other(tmp_path, monkeypatch):
    python = lambda code: [sys.executable, "-c", code, "{json}"]  # noqa: E731
    parts = [
        gpu.Part("fails", python("raise SystemExit('no')")),
        gpu.Part("hangs", python("import time; time.sleep(60)"), seconds=6),
        gpu.Part("absent", ["/no/such/tool"]),
        gpu.Part("works", python("import sys; open(sys.argv[1], 'w').write('[{\"op\": 1}]')")),
    ]
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setitem(gpu.STAGES, "trial", lambda: parts)
    states = {row["case"]: row["state"] for row in gpu.run_stage("trial")}
    assert states == {"fails": "failed", "hangs": "failed", "absent": "failed", "works": "passed"}
    assert {"op": 1} in json.loads((tmp_path / "trial.json").read_text())


@pytest.mark.parametrize("key", OPS)
def test_cases_are_computed_by_the_cpu(key, seed):
    op = OPS[key]
    assert not [what for a in cases(op, 8, seed) if (what := wrong(op, a, "cpu", None))]
    assert first_case(op, seed)


def test_a_placed_case_keeps_strides_and_alignment(seed):
    for arguments in cases(OPS["rms_norm"], 20, seed):
        for name, copy in placed(arguments, "cpu").items():
            if isinstance(copy, torch.Tensor):
                t = arguments[name]
                assert copy.stride() == t.stride() and torch.equal(copy.nan_to_num(), t.nan_to_num())
                assert not t.numel() or copy.data_ptr() % 16 == t.data_ptr() % 16


UNDER_THE_INTERPRETER = """
import sys
sys.path += [sys.argv[1], sys.argv[1] + "/triton"]
import torch
torch.set_num_threads(1)
from device_cases import OPS, backends, cases, wrong
bad = []
for name in ("rms_norm", "layer_norm.out", "dequantize_groups", "silu_mul", "rope", "quantize_int8"):
    op = OPS[name]
    assert "triton" in backends(op.name), name
    for a in cases(op, 8, int(sys.argv[2])):
        kinds = [v.dtype if isinstance(v, torch.Tensor) else v for v in a.values()]
        if any(k is torch.bfloat16 for k in kinds):  # which the interpreter truncates
            continue
        bad += [f"{name}: {what}"] if (what := wrong(op, a, "cpu", "triton")) else []
raise SystemExit("\\n".join(bad) or None)
"""


def test_cases_run_on_a_backend_under_the_interpreter(seed):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", UNDER_THE_INTERPRETER, str(ROOT / "tests"), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_table_of_proofs_is_up_to_date():
    assert verified.README.read_text() == verified.readme(), "run: python tools/verified.py"


def test_a_proof_counts_for_the_sources_that_passed(tmp_path, monkeypatch):
    proofs = tmp_path / "proven.json"
    proofs.write_text("[]")
    monkeypatch.setattr(verified, "PROOFS", proofs)
    row = {
        "op": "rms_norm", "backend": "cuda", "arch": "sm_90", "passed": 4, "failed": 0, "device": "GPU",
        "uuid": "u", "seed": 7, "versions": {}, "sources": dispatch.source_hash("rms_norm", "cuda"),
    }  # fmt: skip
    results = tmp_path / "correctness.json"
    results.write_text(json.dumps([{"room": "machine"}, row, {**row, "op": "layer_norm", "failed": 1}]))
    verified.take_over(results)
    assert [p["op"] for p in json.loads(proofs.read_text())] == ["rms_norm"]
    passed = verified.state("rms_norm", "cuda", json.loads(proofs.read_text()))
    assert passed.endswith(f"passed on GPU (sm_90, u, sources {row['sources'][:8]}, seed 7)")
    changed = [{**p, "sources": "of other bytes"} for p in json.loads(proofs.read_text())]
    assert verified.state("rms_norm", "cuda", changed).endswith("not run on a GPU")
