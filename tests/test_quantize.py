import math

import pytest
import torch

from conftest import forced, variants
from narrowcast.kernels.quantize import quantize_ref as ref

ops = torch.ops.narrowcast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (2, 3, 32), (5, 97), (17, 384), (1, 1000), (33, 64), (2, 1088)]


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b), (a, b)


def odd_values(shape, dtype):
    """Ordinary numbers with zeros, ties, infinities, NaN, tiny and huge rows among them."""
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x[torch.rand(shape) < 0.05] = math.inf
    x[torch.rand(shape) < 0.05] = -math.inf
    x[torch.rand(shape) < 0.05] = math.nan
    x[torch.rand(shape) < 0.1] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("variant", variants("quantize"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_equal_reference(variant, dtype, shape):
    with forced("quantize", variant):
        for x in (torch.randn(shape).to(dtype), odd_values(shape, dtype), torch.zeros(shape, dtype=dtype)):
            assert_equal(ops.quantize_int8(x), ref.quantize_int8(x))
            assert_equal(ops.quantize_int8_asymmetric(x), ref.quantize_int8_asymmetric(x))
            for group in (32, 64):
                if shape[-1] % group == 0:
                    assert_equal(ops.quantize_int8(x, group), ref.quantize_int8(x, group))
            for scale, zero_point, out in ((0.02, 3, torch.uint8), (-0.5, -7, torch.int8)):
                q = ops.quantize_int8_static(x, scale, zero_point, out)
                assert torch.equal(q, ref.quantize_int8_static(x, scale, zero_point, out))


@pytest.mark.parametrize("variant", variants("quantize"))
def test_extreme_magnitudes(variant):
    x = torch.tensor([[1e-45, 0.0], [1e-38, -1e-39], [3e38, -3.4e38], [2e-36, 1e-36]])
    with forced("quantize", variant):
        assert_equal(ops.quantize_int8(x), ref.quantize_int8(x))
        assert_equal(ops.quantize_int8_asymmetric(x), ref.quantize_int8_asymmetric(x))


def test_static_equals_torch_quantize():
    x = torch.randn(1000) * 3
    expected = torch.quantize_per_tensor(x, 0.05, 10, torch.quint8).int_repr()
    assert torch.equal(ops.quantize_int8_static(x, 0.05, 10, torch.uint8), expected)


def test_strided_expanded_empty():
    x = torch.randn(9, 64)
    for y in (x[::2, :32], x.t(), x[0].expand(4, 64), x[:, ::2], x[:0], x.new_empty(3, 0)):
        assert_equal(
            ops.quantize_int8(y), ref.quantize_int8(y) if y.numel() else ops.quantize_int8(y.clone())
        )
    assert ops.quantize_int8(x.new_empty(3, 0))[1].tolist() == [1, 1, 1]
    image = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    q = ops.quantize_int8_static(image, 0.1, 0)
    assert q.stride() == image.stride() and torch.equal(q, ref.quantize_int8_static(image, 0.1))


def test_nan_are_counted_and_strict_raises():
    x = torch.tensor([[1.0, math.nan, math.inf], [math.nan, 0.0, 1.0]])
    ops.nan_count(reset=True)
    q, scale = ops.quantize_int8(x)
    assert ops.nan_count() == 2 and q[0].tolist() == [127, 0, 127] and scale[0] == 1 / 127
    with pytest.raises(RuntimeError, match="quantize_int8: x must be finite"):
        ops.quantize_int8(x, strict=True)
    with pytest.raises(RuntimeError, match="quantize_int8_static: x must be finite"):
        ops.quantize_int8_static(x, 1.0, strict=True)


def test_opcheck_and_compile():
    x = torch.randn(4, 64)
    for op, arguments in (
        (ops.quantize_int8, (x,)),
        (ops.quantize_int8, (x, 32)),
        (ops.quantize_int8_asymmetric, (x,)),
        (ops.quantize_int8_static, (x, 0.1, 3)),
    ):
        torch.library.opcheck(op.default, arguments)
    f = torch.compile(lambda y: ops.quantize_int8(y)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(x), ref.quantize_int8(x)[0] + 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.quantize_int8(torch.ones(2, 3, dtype=torch.int8)), "x must be float32"),
        (lambda: ops.quantize_int8(torch.tensor(1.0)), "at least one dimension"),
        (lambda: ops.quantize_int8(torch.ones(2, 30), 32), "group_size must be 0"),
        (lambda: ops.quantize_int8(torch.ones(2, 30), -1), "group_size must be 0"),
        (lambda: ops.quantize_int8_static(torch.ones(2), 0.0), "scale must be finite"),
        (lambda: ops.quantize_int8_static(torch.ones(2), 1.0, 300), "zero_point must be"),
        (lambda: ops.quantize_int8_static(torch.ones(2), 1.0, 0, torch.int32), "dtype must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
