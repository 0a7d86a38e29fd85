import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import narrowcast
from narrowcast import functional as NF
from narrowcast.kernels import gated_act, norm, quantize, rope

ops = torch.ops.narrowcast
CATALOGUE = Path(__file__).parents[1] / "kernels" / "library.cpp"


def test_names_are_the_catalogue():
    declared = re.findall(r'm\.def\(\s*"([a-z]\w*)\(', CATALOGUE.read_text())
    assert sorted(NF.__all__) == sorted(declared)


def test_names_lead_to_the_rooms():
    for room in (quantize, norm, gated_act, rope):
        for op in NF.ROOMS[room.__name__.rpartition(".")[2]]:
            function, target = getattr(NF, op), getattr(room, op)
            assert function.__wrapped__ is target and function.__doc__ == target.__doc__
            assert inspect.signature(function) == inspect.signature(target)
            schema = getattr(ops, op).default._schema
            assert list(inspect.signature(target).parameters) == [a.name for a in schema.arguments]


def test_torch_in_torch_out():
    x, w = torch.randn(3, 64), torch.randn(64)
    assert torch.equal(NF.rms_norm(x, w, 1e-5), ops.rms_norm(x, w, 1e-5))
    assert all(isinstance(t, torch.Tensor) for t in NF.quantize_int8(x, group_size=32))


def test_numpy_in_numpy_out():
    x, w = np.random.randn(3, 64).astype(np.float32), np.ones(64, np.float16)
    y, total = NF.add_rms_norm(x, x, weight=w, eps=1e-5)
    assert isinstance(y, np.ndarray) and isinstance(total, np.ndarray)
    np.testing.assert_array_equal(total, x + x)
    q, scale = NF.quantize_int8(x)
    back = NF.dequantize_int8(q, scale, out_dtype=np.float16)
    assert back.dtype == np.float16 and np.abs(back - x).max() <= scale.max()
    q = NF.quantize_int8_static(x, 0.05, 3, dtype="uint8")
    assert q.dtype == np.uint8


def test_awkward_numpy_arrays():
    x = np.random.randn(3, 64).astype(np.float32)
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(NF.quantize_int8(read_only)[0], NF.quantize_int8(x)[0])
    np.testing.assert_array_equal(NF.quantize_int8(x[:, ::-1])[0], NF.quantize_int8(x)[0][:, ::-1])
    assert NF.quantize_int8(x[:0])[0].shape == (0, 64)


def test_memory_is_shared():
    x = np.zeros((2, 8), np.float32)
    assert NF._tensor("op", "x", x, written=True).data_ptr() == x.ctypes.data
    x.flags.writeable = False
    with pytest.raises(narrowcast.ArgumentError, match="kv_append: k_cache must be writable"):
        NF._tensor("kv_append", "k_cache", x, written=True)


class Producer:
    """The least that an array of another library offers."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return type(self)

    @classmethod
    def from_dlpack(cls, other):
        return cls(torch.from_dlpack(other))


def test_any_dlpack_producer():
    x = torch.randn(3, 64)
    y = NF.silu_mul(Producer(x), x)
    assert isinstance(y, Producer) and torch.equal(y.tensor, ops.silu_mul(x, x))


def test_errors():
    x = np.ones((2, 8), np.float32)
    with pytest.raises(narrowcast.ArgumentError, match="quantize_int8: x must be a tensor"):
        NF.quantize_int8([1.0, 2.0])
    with pytest.raises(narrowcast.ArgumentError, match="out_dtype must be one that NumPy has"):
        NF.dequantize_int8(*NF.quantize_int8(x), out_dtype=torch.bfloat16)
    with pytest.raises(narrowcast.ArgumentError, match="quantize_int8_static: dtype must be a dtype"):
        NF.quantize_int8_static(x, 1.0, dtype="byte-ish")
    with pytest.raises(RuntimeError, match="quantize_int8: group_size must be 0"):
        NF.quantize_int8(x, 3)
    with pytest.raises(TypeError, match="missing a required argument: 'up'"):
        NF.silu_mul(x)
