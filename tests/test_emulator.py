"""CUDA kernels on the CPU: the emulator finds planted bugs, and the kernels give the bits of the CPU ones."""

from __future__ import annotations

import subprocess

import pytest

from emulator.build import PROGRAMS, build


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_program(program):
    done = subprocess.run([build(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
