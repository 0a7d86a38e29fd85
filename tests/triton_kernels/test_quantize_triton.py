import math

import pytest
import torch

from conftest import LOADED
from narrowcast.kernels.quantize import nan_count
from narrowcast.kernels.quantize import quantize_ref as ref
from narrowcast.kernels.quantize import quantize_triton as ours

SHAPES = [(1, 1), (3, 7), (2, 3, 32), (5, 97), (17, 384), (1, 1000), (33, 64)]


def assert_equal(given, expected):
    for a, b in zip(given, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (a, b)


def odd_values(shape, dtype):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    for value, share in ((math.inf, 0.05), (-math.inf, 0.05), (math.nan, 0.05), (0.0, 0.1)):
        x[torch.rand(shape) < share] = value
    return x.to(dtype)


@pytest.mark.parametrize("dtype", LOADED)
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_equal_reference(dtype, shape):
    for x in (torch.randn(shape).to(dtype), odd_values(shape, dtype), torch.zeros(shape, dtype=dtype)):
        assert_equal(ours.quantize_int8(x), ref.quantize_int8(x))
        assert_equal(ours.quantize_int8_asymmetric(x), ref.quantize_int8_asymmetric(x))
        if shape[-1] % 32 == 0:
            assert_equal(ours.quantize_int8(x, 32), ref.quantize_int8(x, 32))
        for scale, zero_point, out in ((0.02, 3, torch.uint8), (-0.5, -7, torch.int8)):
            q = ours.quantize_int8_static(x, scale, zero_point, out)
            assert torch.equal(q, ref.quantize_int8_static(x, scale, zero_point, out))


def test_rows_longer_than_a_tile():
    x = torch.randn(2, 3 * 8192 + 5)
    assert_equal(ours.quantize_int8(x), ref.quantize_int8(x))
    assert_equal(ours.quantize_int8_asymmetric(x), ref.quantize_int8_asymmetric(x))
    x = torch.randn(2, 2 * 9000)
    assert_equal(ours.quantize_int8(x, 9000), ref.quantize_int8(x, 9000))


def test_extreme_magnitudes_and_ties():
    x = torch.tensor([[1e-45, 0.0], [1e-38, -1e-39], [3e38, -3.4e38], [2e-36, 1e-36], [127, 0.5], [127, 1.5]])
    assert_equal(ours.quantize_int8(x), ref.quantize_int8(x))
    assert_equal(ours.quantize_int8_asymmetric(x), ref.quantize_int8_asymmetric(x))
    ties = torch.arange(-20, 20) + 0.5
    assert torch.equal(ours.quantize_int8_static(ties, 1.0), ties.round().to(torch.int8))


def test_strided_expanded_empty():
    x = torch.randn(9, 64)
    for y in (x[::2, :32], x.t(), x[0].expand(4, 64), x[:, ::2], x[3:, 1:]):
        assert_equal(ours.quantize_int8(y), ref.quantize_int8(y))
        assert torch.equal(ours.quantize_int8_static(y, 0.1), ref.quantize_int8_static(y, 0.1))
    assert ours.quantize_int8(x[:0])[0].shape == (0, 64)
    assert ours.quantize_int8(x.new_empty(3, 0))[1].tolist() == [1, 1, 1]
    image = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    q = ours.quantize_int8_static(image, 0.1, 0)
    assert q.stride() == image.stride() and torch.equal(q, ref.quantize_int8_static(image, 0.1))


def test_nan_are_counted_and_strict_raises():
    x = torch.tensor([[1.0, math.nan, math.inf], [math.nan, 0.0, 1.0]])
    nan_count(reset=True)
    q, scale = ours.quantize_int8(x)
    assert nan_count() == 2 and q[0].tolist() == [127, 0, 127] and scale[0] == 1 / 127
    for call in (
        lambda: ours.quantize_int8(x, strict=True),
        lambda: ours.quantize_int8_asymmetric(x, strict=True),
        lambda: ours.quantize_int8_static(x, 1.0, strict=True),
    ):
        with pytest.raises(RuntimeError, match="x must be finite"):
            call()
    assert nan_count(reset=True) == 8 and nan_count() == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ours.quantize_int8(torch.ones(2, 3, dtype=torch.int8)), "quantize_int8: x must be float32"),
        (lambda: ours.quantize_int8(torch.tensor(1.0)), "at least one dimension"),
        (lambda: ours.quantize_int8(torch.ones(2, 30), 32), "group_size must be 0"),
        (lambda: ours.quantize_int8(torch.ones(2, 30), -1), "group_size must be 0"),
        (lambda: ours.quantize_int8_static(torch.ones(2), 0.0), "scale must be finite"),
        (lambda: ours.quantize_int8_static(torch.ones(2), math.nan), "scale must be finite"),
        (lambda: ours.quantize_int8_static(torch.ones(2), 1.0, 300), "zero_point must be"),
        (lambda: ours.quantize_int8_static(torch.ones(2), 1.0, 0, torch.int32), "dtype must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
