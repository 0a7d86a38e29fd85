"""Triton kernels under the interpreter, or on the GPU of this machine when TRITON_INTERPRET is not set.

Run by tests/test_triton.py in processes of their own: the interpreter must be asked for before triton is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
    os.environ["TRITON_INTERPRET"] = "1"
if os.environ.get("TRITON_INTERPRET") == "1":
    torch.set_num_threads(1)

sys.path.append(str(Path(__file__).parents[1]))  # tolerances, cases: shared with the CPU's tests

#: The interpreter truncates where hardware rounds to bfloat16: there BF16 kernels run in the other two.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
STORED = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LOADED = [torch.float32, torch.float16, torch.bfloat16]


if DEVICE == "cpu":
    from triton.runtime import interpreter

    _set_attr = interpreter._LangPatchScope.set_attr

    def _mended(scope, target, name, value):
        """Loop bounds known at run time: NumPy 2.4 makes no int of the interpreter's arrays of one element."""
        if name == "__index__":
            value = lambda tensor: int(tensor.handle.data.item())  # noqa: E731
        _set_attr(scope, target, name, value)

    interpreter._LangPatchScope.set_attr = _mended


@pytest.fixture(autouse=True)
def on_device():
    """Fresh tensors of a test are made where its kernels run."""
    with torch.device(DEVICE):
        yield
