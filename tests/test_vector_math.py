"""The elementary functions of vec_avx512.h and vec_avx2.h, compiled alone and compared with float64."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[1] / "kernels"
ISAS = {
    "avx512": ("-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c", 16),
    "avx2": ("-mavx2 -mfma -mf16c", 8),
}
AVAILABLE = [isa for isa in ISAS if torch.ops.narrowcast._isa() in ("amx", "avx512", isa)]
FUNCTIONS = {
    "exp": (torch.exp, 1.5e-7),
    "tanh": (torch.tanh, 3e-7),
    "erf": (torch.erf, 3e-7),
    "silu": (torch.nn.functional.silu, 4e-7),
    "gelu": (torch.nn.functional.gelu, 4e-7),
    "gelu_tanh": (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), 4e-7),
}

SOURCE = """
#include "common/vec_{isa}.h"
using namespace narrowcast;
#define EXPORT(name) extern "C" void name(const float* x, float* y, long n) {{ \\
  for (long i = 0; i < n; i += {lanes}) \\
    _mm{bits}_storeu_ps(y + i, name##{lanes}(_mm{bits}_loadu_ps(x + i))); }}
EXPORT(exp) EXPORT(tanh) EXPORT(erf) EXPORT(silu) EXPORT(gelu) EXPORT(gelu_tanh)
"""


@pytest.fixture(scope="module", params=AVAILABLE)
def library(request, tmp_path_factory):
    flags, lanes = ISAS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "functions.cpp"
    source.write_text(SOURCE.format(isa=request.param, lanes=lanes, bits="512" if lanes == 16 else "256"))
    command = (
        f"g++ -std=c++20 -O2 -fno-builtin -shared -fPIC {flags} -I{KERNELS} -o functions.so functions.cpp"
    )
    subprocess.run(command.split(), cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "functions.so"))


def call(library, name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    pointer = ctypes.c_void_p
    getattr(library, name)(pointer(x.data_ptr()), pointer(y.data_ptr()), ctypes.c_long(x.numel()))
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(library, name):
    function, bound = FUNCTIONS[name]
    x = torch.cat([torch.randn(1 << 14) * s for s in (0.01, 1.0, 5.0, 30.0)]).clamp(max=88)
    expected = function(x.double())
    error = (call(library, name, x) - expected).abs() / expected.abs().clamp(min=1.0)
    assert error.max() <= bound
    if name == "exp":  # relative accuracy over the whole normal range
        expected = expected.clamp(min=torch.finfo(torch.float32).tiny)
        assert ((call(library, name, x) - expected).abs() / expected)[x > -87].max() <= 2.5e-7


@pytest.mark.parametrize("name", FUNCTIONS)
def test_edges(library, name):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 88.0, -104.0, 1e30] * 2)
    y = call(library, name, x)
    assert y[4].isnan()
    expected = FUNCTIONS[name][0](x.double()).float()
    for i in (0, 1, 2, 5, 6, 7):
        torch.testing.assert_close(y[i], expected[i], rtol=3e-7, atol=1e-30)
