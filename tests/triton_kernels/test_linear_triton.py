import itertools

import pytest
import torch

from conftest import STORED
from narrowcast.kernels.linear import linear_ref as ref
from narrowcast.kernels.linear.linear_triton import linear
from narrowcast.kernels.linear_int8.linear_int8_ref import ACTIVATIONS
from tolerances import assert_close

SHAPES = [(1, 1, 1), (1, 33, 64), (3, 70, 17), (33, 65, 100), (40, 5, 32), (65, 64, 96)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_matches_reference(dtype, m, n, k):
    x, weight = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    assert_close(linear(x, weight), ref.linear(x, weight))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_epilogue(activation):
    x, weight = torch.randn(2, 5, 24), torch.randn(37, 24)
    for dtype, post in itertools.product(STORED, ("none", "relu6", "silu")):
        bias, residual = torch.randn(37).to(dtype), torch.randn(2, 5, 37).to(dtype)
        for b, r in ((bias, residual), (None, residual), (bias, None)):
            out = linear(x, weight, b, activation, r, dtype, post_activation=post)
            assert out.dtype == dtype and out.shape == (2, 5, 37)
            assert_close(
                out, ref.linear(x, weight, b, activation, r, post), 8e-6 if dtype == torch.float32 else None
            )


def test_strides():
    x, weight = torch.randn(40, 6)[::2].T, torch.randn(50, 40)[::2, ::2]
    residual = torch.randn(25, 6).T
    assert_close(linear(x, weight, residual=residual), ref.linear(x, weight, residual=residual))
    row = torch.randn(20).expand(6, 20)
    assert_close(linear(row, weight), ref.linear(row, weight))


def test_special_values():
    x = torch.randn(4, 40)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    out = linear(x, torch.ones(20, 40), activation="relu")
    assert out[0].isnan().all() and out[1].isinf().all() and out[2:].isfinite().all()


def test_empty():
    assert linear(torch.randn(0, 8), torch.randn(5, 8)).shape == (0, 5)
    assert linear(torch.randn(3, 8), torch.randn(0, 8)).shape == (3, 0)
    assert torch.equal(linear(torch.randn(3, 0), torch.randn(5, 0), torch.ones(5)), torch.ones(3, 5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(4, 8).int()}, "x must be float32"),
        ({"weight": torch.ones(5, 7)}, "weight must be float32 \\[N, K\\] with K = 8"),
        ({"weight": torch.ones(5, 8).half()}, "weight must be float32"),
        ({"bias": torch.ones(4)}, "bias must be"),
        ({"residual": torch.ones(4, 4)}, "residual must be"),
        ({"activation": "tanh"}, "activation must be none"),
        ({"post_activation": "x"}, "post_activation must be none"),
        ({"out_dtype": torch.int8}, "out_dtype must be float32"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(RuntimeError, match=f"^linear: {message}"):
        linear(**{"x": torch.ones(4, 8), "weight": torch.ones(5, 8)} | change)
