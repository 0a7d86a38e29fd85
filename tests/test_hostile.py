"""Hostile and odd input to every op, in a process of its own: see tests/fuzz/hostile.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PRIVATE = ("nan_count",)  # takes no tensor


SEED, CASES = 5, 500  # of every op; `make hostile` draws others


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "outcome.json"
    command = [sys.executable, "-W", "ignore", "-m", "fuzz.hostile"]
    command += ["--cases", str(CASES), "--seed", str(SEED), "--json", str(path)]
    # glibc fills freed memory with rubbish, so that a read of memory nobody wrote shows.
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    assert path.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text()), done


def test_nothing_crashes_and_nothing_is_wrong(outcome):
    result, done = outcome
    failures = [f"{f['op']} --case {f['case']}: {f['text'][:300]}" for f in result["failures"]]
    assert not failures, "\n".join(failures[:10])
    assert done.returncode == 0, done.stdout[-2000:]


def test_most_cases_are_legal_and_computed(outcome):
    for name, counts in outcome[0]["counts"].items():
        assert sum(counts.values()) == CASES
        assert counts["computed"] >= 0.6 * CASES, f"{name}: {counts}"


def test_every_public_op_is_covered(outcome):
    covered = set(outcome[0]["counts"])
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space != "narrowcast" or name.startswith("_") or name in PRIVATE:
            continue
        full = f"{name}.{schema.overload_name}" if schema.overload_name else name
        assert full in covered, f"{full} has no generator in tests/fuzz"
