import pytest
import torch
from torch import nn

from conftest import forced, variants
from narrowcast.kernels.linear_int8.linear_int8_ref import requantise
from narrowcast.kernels.pool import pool_ref as ref
from narrowcast.runtime import Executor
from pool_cases import DTYPES, WINDOWS

ops = torch.ops.narrowcast
VARIANTS = variants("pool")
SHAPES = [(1, 1, 7, 9), (2, 17, 9, 8), (1, 67, 13, 11), (1, 600, 7, 7)]


def image(shape, dtype, channels_last=True):
    low = -128 if dtype == torch.int8 else 0
    x = torch.randint(low, low + 256, shape, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_max(variant, dtype, window, shape):
    x = image(shape, dtype)
    with forced("pool", variant):
        out = ops.max_pool2d_int8(x, *window)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, ref.max_pool2d_int8(x, *window))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [w[:3] for w in WINDOWS] + [((), (), (0, 0)), ((2, 2), (), (0, 0))])
@pytest.mark.parametrize("shape", SHAPES)
def test_average(variant, dtype, window, shape):
    x, scale = image(shape, dtype), 0.037
    zero_point = -7 if dtype == torch.int8 else 131
    expected = ref.avg_pool2d_int8(x, scale, zero_point, *window)
    with forced("pool", variant):
        out = ops.avg_pool2d_int8(x, scale, zero_point, *window)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, expected)
        half = ops.avg_pool2d_int8(x, scale, zero_point, *window, out_dtype=torch.bfloat16)
        assert torch.equal(half, expected.bfloat16())
        for out_dtype, out_zero_point in ((torch.uint8, 9), (torch.int8, -3)):
            codes = ops.avg_pool2d_int8(x, scale, zero_point, *window, 0.021, out_zero_point, out_dtype)
            assert torch.equal(codes, requantise(expected, 0.021, out_zero_point, out_dtype))


def test_large_window_is_exact():
    x = torch.full((1, 3, 1500, 1500), 255, dtype=torch.uint8)
    assert torch.equal(ops.avg_pool2d_int8(x, 1.0, 0), ref.avg_pool2d_int8(x, 1.0, 0))


def test_windows_outside_the_image():
    x = image((1, 5, 4, 4), torch.int8)
    out = ops.max_pool2d_int8(x, (2, 2), (1, 1), (1, 1), (5, 5))
    assert (out == -128).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    big = image((4, 40, 20, 18), dtype, channels_last=False)
    for x in (
        big,
        big[::2, 3:36, 1::2, ::3],
        big.transpose(2, 3),
        big[:1].expand(3, 40, 20, 18),
        big[:, :1].expand(4, 40, 20, 18),
        big.permute(1, 0, 2, 3),
    ):
        assert torch.equal(ops.max_pool2d_int8(x, (3, 3), (2, 2)), ref.max_pool2d_int8(x, (3, 3), (2, 2)))
        assert torch.equal(ops.avg_pool2d_int8(x, 0.5, 3), ref.avg_pool2d_int8(x, 0.5, 3))


def test_empty():
    x = image((0, 3, 4, 4), torch.uint8)
    assert ops.max_pool2d_int8(x, (2, 2), (2, 2)).shape == (0, 3, 2, 2)
    assert ops.avg_pool2d_int8(x, 1.0, 0).shape == (0, 3, 1, 1)
    assert ops.avg_pool2d_int8(x.new_zeros(2, 0, 4, 4), 1.0, 0).shape == (2, 0, 1, 1)


def test_opcheck_and_compile():
    x = image((2, 5, 9, 7), torch.uint8)
    for ceil in (False, True):
        torch.library.opcheck(ops.max_pool2d_int8.default, (x, (3, 3), (2, 2), (1, 1), (1, 1), ceil))
    torch.library.opcheck(ops.avg_pool2d_int8.default, (x, 0.1, 3))
    torch.library.opcheck(
        ops.avg_pool2d_int8.default, (x, 0.1, 3, (3, 3), (2, 2), (1, 1), 0.2, 5, torch.int8)
    )
    f = torch.compile(lambda y: ops.max_pool2d_int8(y, 2, 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(f(x), ops.max_pool2d_int8(x, 2, 2))


class Pools(nn.Module):
    def forward(self, x):
        y = ops.max_pool2d_int8(x, [3, 3], [2, 2], [1, 1])
        return y, ops.avg_pool2d_int8(y, 0.1, 3), ops.avg_pool2d_int8(x, 0.1, 3, [2, 2], out_scale=0.2)


@pytest.mark.parametrize("channels_last", [False, True])
def test_steps(channels_last):
    x = image((2, 5, 9, 7), torch.uint8, channels_last)
    exe = Executor(torch.export.export(Pools(), (x,)).module(check_guards=False), device="cpu")
    rows = exe.explain(x).rows
    assert [r.backend.startswith("native") for r in rows if "pool" in r.op] == [True] * 3
    for _ in range(2):
        exe.program(x).arena_tensor.fill_(0xFF)
        for out, expected in zip(exe(x), Pools()(x)):
            assert torch.equal(out, expected)
        x = image((2, 5, 9, 7), torch.uint8, channels_last)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_q": torch.ones(1, 2, 8, 8)}, "x_q must be int8 or uint8"),
        ({"x_q": torch.ones(2, 8, 8, dtype=torch.int8)}, r"x_q must be \[N, C, H, W\]"),
        ({"x_q": torch.ones(1, 2, 0, 8, dtype=torch.int8)}, r"x_q must be \[N, C, H, W\]"),
        ({"kernel_size": [3]}, "kernel_size must be 2 numbers"),
        ({"kernel_size": [0, 1]}, "kernel_size must be 2 numbers from 1"),
        ({"kernel_size": [9, 9]}, "kernel_size must fit the padded image"),
        ({"kernel_size": [2**62, 2]}, "kernel_size must be 2 numbers"),
        ({"stride": [0, 1]}, "stride must be 2 numbers from 1"),
        ({"padding": [-1, 0]}, "padding must be 2 numbers from 0"),
        ({"padding": [2, 2]}, "padding must be at most half"),
    ],
)
def test_bad_input(change, message):
    x = torch.ones(1, 2, 8, 8, dtype=torch.int8)
    arguments = {"x_q": x, "kernel_size": [3, 3], "stride": [1, 1]} | change
    with pytest.raises(RuntimeError, match=f"max_pool2d_int8: {message}"):
        ops.max_pool2d_int8(**arguments)
    with pytest.raises(RuntimeError, match=f"avg_pool2d_int8: {message}"):
        ops.avg_pool2d_int8(**arguments, x_scale=1.0, x_zero_point=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_zero_point": 128}, "x_zero_point must be a code of x_q's dtype int8"),
        ({"stride": [1, 1]}, "stride must be empty when kernel_size is"),
        ({"padding": [1, 1]}, "padding must be"),
        ({"out_scale": -1.0}, "out_scale must be 0"),
        ({"out_scale": float("nan")}, "out_scale must be 0"),
        ({"out_scale": 1e-60}, "out_scale must be 0"),
        ({"out_dtype": torch.int8}, "out_dtype must be float32"),
        ({"out_scale": 1.0, "out_dtype": torch.float32}, "out_dtype must be uint8 or int8"),
        ({"out_scale": 1.0, "out_zero_point": 256}, "out_dtype must be uint8 or int8"),
    ],
)
def test_bad_average(change, message):
    arguments = {"x_q": torch.ones(1, 2, 8, 8, dtype=torch.int8), "x_scale": 1.0, "x_zero_point": 0}
    with pytest.raises(RuntimeError, match=f"avg_pool2d_int8: {message}"):
        ops.avg_pool2d_int8(**(arguments | change))
