"""Damaged files of every format that is read, in processes of their own: see tests/fuzz/corrupt.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("onnx")

from fuzz.wholes import WHOLES

ROOT = Path(__file__).parents[1]
CASES = 10  # of every format; `make hostile` makes 1000 others


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("corrupt") / "outcome.json"
    command = [sys.executable, "-W", "ignore", "-m", "fuzz.corrupt", "--cases", str(CASES)]
    command += ["--seed", str(request.config.option.seed), "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    assert path.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text())


def test_every_load_ends_in_our_own_error_or_in_a_legal_model(outcome):
    failures = [f"{f['format']} --case {f['case']}: {f['text'][:300]}" for f in outcome["failures"]]
    assert not failures, "\n".join(failures[:10])


def test_most_damage_is_noticed(outcome):
    assert set(outcome["counts"]) == set(WHOLES)
    assert all(sum(c.values()) == CASES for c in outcome["counts"].values())
    refused = sum(c.get("refused", 0) for c in outcome["counts"].values())
    assert refused >= 0.5 * CASES * len(WHOLES), outcome["counts"]
