"""What a user gets by installing: version, types, entry point, and an import that says nothing."""

import os
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch

import narrowcast

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "amx")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_version_is_that_of_the_package():
    assert narrowcast.__version__ == version("narrowcast")


def test_types_are_shipped():
    assert (Path(narrowcast.__file__).parent / "py.typed").exists()


def test_entry_point_loads():
    (script,) = entry_points(group="console_scripts", name="narrowcast")
    assert callable(script.load())


def test_import_leaves_no_warning_and_prints_nothing():
    done = python("import warnings; warnings.simplefilter('error'); import narrowcast")
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "", done.stderr


def test_help_does_not_import_torch():
    done = python("import sys, narrowcast_cli; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cap", INSTRUCTION_SETS)
def test_instruction_set_is_capped(cap):
    code = "import torch, narrowcast; print(torch.ops.narrowcast._isa())"
    done = python(code, NARROWCAST_ISA=cap)
    assert done.returncode == 0, done.stderr
    reached = INSTRUCTION_SETS.index(done.stdout.strip())
    highest = INSTRUCTION_SETS.index(python(code, NARROWCAST_ISA="").stdout.strip())
    assert reached == min(INSTRUCTION_SETS.index(cap), highest)


def test_unknown_instruction_set_is_an_error():
    done = python("import torch, narrowcast; torch.ops.narrowcast._isa()", NARROWCAST_ISA="sse9")
    assert done.returncode != 0 and "NARROWCAST_ISA" in done.stderr and "sse9" in done.stderr


def test_config_names_what_was_loaded():
    text = str(narrowcast.show_config())
    assert narrowcast.__version__ in text and torch.__version__ in text
