"""Runs tests/triton_kernels under the interpreter, each file in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "triton_kernels"
FILES = sorted(FOLDER.glob("test_*.py")) if importlib.util.find_spec("triton") else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_under_the_interpreter(path, seed):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--seed", str(seed), str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER.parent)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
