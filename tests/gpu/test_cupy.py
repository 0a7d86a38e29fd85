"""CuPy arrays in and out without a copy, on CuPy's stream."""

from __future__ import annotations

import pytest
import torch

from narrowcast import functional as NF
from narrowcast.kernels.norm import norm_ref
from tolerances import assert_close

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


def test_arrays_in_and_out():
    x, weight = cupy.random.randn(7, 131, dtype=cupy.float32), cupy.ones(131, dtype=cupy.float32)
    y = NF.rms_norm(x, weight, 1e-5)
    assert isinstance(y, cupy.ndarray) and y.shape == x.shape
    wanted = norm_ref.rms_norm(torch.from_dlpack(x).cpu(), torch.from_dlpack(weight).cpu(), 1e-5)
    assert_close(torch.from_dlpack(y).cpu(), wanted)


def test_an_array_written_in_place_is_the_callers():
    k_cache, v_cache = (cupy.zeros((1, 2, 8, 16), dtype=cupy.float16) for _ in range(2))
    k, v = (cupy.random.randn(1, 2, 3, 16, dtype=cupy.float32).astype(cupy.float16) for _ in range(2))
    NF.kv_append(k_cache, v_cache, k, v, cupy.array([2], dtype=cupy.int32))
    assert bool((k_cache[:, :, 2:5] == k).all()) and bool((v_cache[:, :, 2:5] == v).all())
    assert not bool(k_cache[:, :, 5:].any())


def test_nothing_is_copied_on_the_way(monkeypatch):
    seen = {}

    def noting(function, address):
        def call(array, *options):
            made = function(array, *options)
            seen[address(made)] = address(array)
            return made

        return call

    address = lambda a: a.data_ptr() if isinstance(a, torch.Tensor) else a.data.ptr  # noqa: E731
    monkeypatch.setattr(torch, "from_dlpack", noting(torch.from_dlpack, address))
    monkeypatch.setattr(cupy, "from_dlpack", noting(cupy.from_dlpack, address))
    x = cupy.random.randn(64, 256, dtype=cupy.float32)
    q, scale = NF.quantize_int8(x)
    assert {x.data.ptr, q.data.ptr, scale.data.ptr} <= set(seen) and all(a == b for a, b in seen.items())


def test_results_are_ready_on_the_stream_of_cupy():
    x = torch.randn(512, 1024, device="cuda")
    array, weight = cupy.from_dlpack(x), cupy.ones(1024, dtype=cupy.float32)
    wanted = norm_ref.rms_norm(x.cpu(), torch.ones(1024), 1e-5)
    NF.rms_norm(array, weight, 1e-5)  # compiled by now
    torch.cuda.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch.cuda.Stream()), stream:
        torch.cuda._sleep(20_000_000)  # torch's stream is late; what CuPy reads must not be early
        copy = NF.rms_norm(array, weight, 1e-5) + 0
        stream.synchronize()
    assert_close(torch.from_dlpack(copy).cpu(), wanted)


def test_work_on_a_stream_of_cupy_comes_first():
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.zeros((4096, 4096), dtype=cupy.float32)
        for _ in range(50):
            x += 1
        q, scale = NF.quantize_int8(x)
        stream.synchronize()
    torch.cuda.synchronize()
    assert bool((q == 127).all()) and bool((abs(scale - 50 / 127) < 1e-6).all())
