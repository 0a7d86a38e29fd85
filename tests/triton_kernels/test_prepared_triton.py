"""A plan's store of what kernels make of weights: the same bits, and the kernels that make it run once."""

import pytest
import torch

from narrowcast.kernels.common import triton_util
from narrowcast.kernels.common.prepared import Prepared
from narrowcast.kernels.conv2d import conv2d_triton
from narrowcast.kernels.conv2d_int8 import conv2d_int8_triton
from narrowcast.kernels.linear_int8 import linear_int8_triton


def linear(w):
    x, zero = (
        torch.randint(-127, 128, (5, 40), dtype=torch.int8),
        torch.randint(-9, 9, (5,), dtype=torch.int32),
    )
    scale = torch.rand(5), torch.rand(12)
    return linear_int8_triton, lambda: linear_int8_triton.linear_int8(
        x, scale[0], w, scale[1], x_zero_point=zero
    )


def convolution(w):
    x, scale = torch.randint(0, 256, (1, 8, 6, 6), dtype=torch.uint8), torch.rand(12)
    return conv2d_int8_triton, lambda: conv2d_int8_triton.conv2d_int8(x, 0.1, 7, w, scale)


def floating(w):
    x = torch.randn(1, 8, 6, 6)
    return conv2d_triton, lambda: conv2d_triton.conv2d(x, w)


@pytest.mark.parametrize(
    "case, shape, kept",
    [
        (linear, (12, 40), 12 * 4),
        (convolution, (12, 8, 3, 3), 12 * 4 + 12 * 72),
        (floating, (12, 8, 3, 3), 12 * 72 * 4),
    ],
)
def test_made_once(case, shape, kept, monkeypatch):
    w = torch.randn(shape) if case is floating else torch.randint(-127, 128, shape, dtype=torch.int8)
    room, call = case(w)
    started = []

    def launch(kernel, *arguments, **options):
        started.append(kernel)
        triton_util.launch(kernel, *arguments, **options)

    monkeypatch.setattr(room, "launch", launch)
    wanted, fresh = call(), len(started)
    store, counts = Prepared([w]), []
    for _ in range(3):
        started.clear()
        with store.use():
            assert torch.equal(call(), wanted)
        counts.append(len(started))
    sums = 0 if case is floating else 1
    assert fresh == counts[0] == 1 + sums and counts[1:] == [1, 1]
    assert store.bytes == kept
