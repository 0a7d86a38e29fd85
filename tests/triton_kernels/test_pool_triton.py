import pytest
import torch

from conftest import STORED
from narrowcast.kernels.linear_int8.linear_int8_ref import requantise
from narrowcast.kernels.pool import pool_ref as ref
from narrowcast.kernels.pool.pool_triton import avg_pool2d_int8, max_pool2d_int8
from pool_cases import DTYPES, WINDOWS

CL = torch.channels_last
AVERAGES = [w[:3] for w in WINDOWS] + [((), (), (0, 0)), ((2, 2), (), (0, 0))]
SHAPES = [(1, 1, 7, 9), (2, 17, 9, 8), (1, 130, 7, 7)]


def image(shape, dtype):
    low = -128 if dtype == torch.int8 else 0
    return torch.randint(low, low + 256, shape, dtype=dtype).to(memory_format=CL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max(dtype, window):
    x = image(SHAPES[(WINDOWS.index(window) + dtype.is_signed) % 3], dtype)
    out = max_pool2d_int8(x, *window)
    assert out.is_contiguous(memory_format=CL)
    assert torch.equal(out, ref.max_pool2d_int8(x, *window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", AVERAGES, ids=str)
def test_average(dtype, window):
    x, scale = image(SHAPES[(AVERAGES.index(window) + dtype.is_signed) % 3], dtype), 0.037
    zero_point = -7 if dtype == torch.int8 else 131
    expected = ref.avg_pool2d_int8(x, scale, zero_point, *window)
    out = avg_pool2d_int8(x, scale, zero_point, *window)
    assert out.is_contiguous(memory_format=CL)
    assert torch.equal(out, expected)
    out_zero_point = -3 if dtype == torch.int8 else 9
    codes = avg_pool2d_int8(x, scale, zero_point, *window, 0.021, out_zero_point, dtype)
    assert torch.equal(codes, requantise(expected, 0.021, out_zero_point, dtype))


@pytest.mark.parametrize("dtype", STORED)
def test_dtypes_of_the_average(dtype):
    x = image((1, 20, 5, 5), torch.uint8)
    expected = ref.avg_pool2d_int8(x, 0.1, 3, (2, 2))
    assert torch.equal(avg_pool2d_int8(x, 0.1, 3, (2, 2), out_dtype=dtype), expected.to(dtype))


def test_windows_larger_than_the_image():
    x = image((1, 3, 5, 4), torch.uint8)
    window = ((2**30 + 1, 2**20), (2**29, 2**19), (2**29, 2**19))
    whole = x.amax((2, 3), keepdim=True)
    out = max_pool2d_int8(x, *window)
    assert out.shape == (1, 3, 1, 1) and torch.equal(out[:, :, :1, :1], whole)
    assert torch.equal(avg_pool2d_int8(x, 0.1, 3, *window), ref.avg_pool2d_int8(x, 0.1, 3))


def test_any_layout_and_empty():
    x = image((2, 17, 6, 7), torch.int8)
    expected = ref.max_pool2d_int8(x, (2, 2), (2, 2))
    for view in (x.contiguous(), x.flip(3).contiguous().flip(3)):
        assert torch.equal(max_pool2d_int8(view, (2, 2), (2, 2)), expected)
    assert max_pool2d_int8(x[:0], (2, 2), (2, 2)).shape == (0, 17, 3, 3)
    assert avg_pool2d_int8(x[:, :0], 0.1, 0).shape == (2, 0, 1, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: max_pool2d_int8(x.float(), (2, 2), (1, 1)), "max_pool2d_int8: x_q must be int8 or uint8"),
        (
            lambda x: max_pool2d_int8(x, (), (1, 1)),
            "max_pool2d_int8: kernel_size must be 2 numbers, got none",
        ),
        (lambda x: max_pool2d_int8(x, (2, 2), ()), "max_pool2d_int8: stride must be 2 numbers, got none"),
        (
            lambda x: max_pool2d_int8(x, (2, 2), (1, 1), (2, 0)),
            "max_pool2d_int8: padding must be at most half",
        ),
        (lambda x: max_pool2d_int8(x, (9, 2), (1, 1)), "max_pool2d_int8: kernel_size must fit"),
        (lambda x: avg_pool2d_int8(x, 0.1, 300), "avg_pool2d_int8: x_zero_point must be a code"),
        (lambda x: avg_pool2d_int8(x, 0.1, 0, (), (1, 1)), "avg_pool2d_int8: stride must be empty"),
        (lambda x: avg_pool2d_int8(x, 0.1, 0, out_scale=-1.0), "avg_pool2d_int8: out_scale must be 0"),
        (
            lambda x: avg_pool2d_int8(x, 0.1, 0, out_dtype=torch.int8),
            "avg_pool2d_int8: out_dtype must be float32",
        ),
        (
            lambda x: avg_pool2d_int8(x, 0.1, 0, out_scale=0.1, out_zero_point=-1),
            "avg_pool2d_int8: out_dtype must be",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(RuntimeError, match=f"^{message}"):
        call(torch.ones(1, 3, 5, 5, dtype=torch.uint8))
