import itertools
import math

import pytest
import torch

from conftest import STORED
from linear_grouped_cases import weight
from narrowcast.kernels.dequantize.dequantize_ref import dequantize_groups
from narrowcast.kernels.linear_grouped import linear_grouped_ref as ref
from narrowcast.kernels.linear_grouped.linear_grouped_triton import linear_grouped
from tolerances import BOUND, assert_close

SHAPES = [  # m, n, k, group
    (1, 1, 32, 32),
    (1, 70, 288, 32),
    (2, 33, 512, 128),
    (5, 33, 512, 128),
    (1, 9, 1536, 192),
    (3, 17, 96, 32),
    (33, 5, 192, 96),
    (13, 33, 256, 64),
    (70, 40, 256, 256),
    (7, 31, 576, 576),
]


def check(x, w, **options):
    out = linear_grouped(x, *w, **options)
    out_dtype = options.pop("out_dtype", None) or x.dtype
    expected = ref.linear_grouped(x, *w, **options)
    assert out.dtype == out_dtype
    bound = None
    if expected.numel() < 16:  # few results may all cancel: measure against what was summed
        size = x.double().abs().sum(-1).max() * dequantize_groups(*w).double().abs().max()
        bound = max(BOUND[out_dtype], 2**-20 * (size / expected.norm().clamp(min=1e-30)).item())
    assert_close(out, expected, bound, f"{tuple(x.shape)} {w[3:]} {options}")


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, bits, activation_bits):
    m, n, k, group = shape
    for with_offset, scale_dtype in itertools.product((False, True), (torch.float32, torch.float16)):
        check(
            torch.randn(m, k),
            weight(n, k, group, bits, with_offset, scale_dtype),
            activation_bits=activation_bits,
        )


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("x_dtype", STORED)
@pytest.mark.parametrize("out_dtype", [None, *STORED])
def test_dtypes(activation_bits, x_dtype, out_dtype):
    x = torch.randn(2, 5, 192).to(x_dtype)
    for bits, group in ((4, 32), (8, 96)):
        w = weight(37, 192, group, bits, scale_dtype=torch.float16)
        bias, residual = torch.randn(37).half(), torch.randn(2, 5, 37).to(x_dtype)
        check(
            x, w, bias=bias, activation="relu", residual=residual, out_dtype=out_dtype,
            activation_bits=activation_bits,
        )  # fmt: skip


@pytest.mark.parametrize("activation", list(ref.ACTIVATIONS))
def test_epilogue_of_parts_and_of_wholes(activation):
    for (n, k), post in itertools.product(((40, 64), (20, 512)), ("none", "relu6")):
        w, bias, residual = weight(n, k, 32, 4), torch.randn(n), torch.randn(14, n)
        for b, r in ((bias, residual), (None, None)):
            check(torch.randn(14, k), w, bias=b, activation=activation, residual=r, post_activation=post)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 5, 70])
def test_integer_part_is_exact(bits, m):
    """Activations that are codes times a power of two, and unit scales: nothing rounds."""
    packed = torch.randint(0, 256, (19, 128 * bits // 8), dtype=torch.uint8)
    w = (packed, torch.ones(19, 4), torch.full((19, 4), 2.0), 32, bits)
    x = torch.randint(-127, 128, (m, 128)).float()
    x[:, ::32] = 127
    out = linear_grouped(x * 0.25, *w, activation_bits=8)
    assert torch.equal(out.double(), ref.linear_grouped(x * 0.25, *w, activation_bits=8))


@pytest.mark.parametrize("m", [4, 70])
def test_special_activations(m):
    """A NaN counts as 0 and an infinity as the largest code; zero and tiny rows stay finite."""
    w = weight(20, 64, 32, 4)
    x = torch.randn(m, 64)
    x[0, 3], x[1, 7], x[1, 40], x[2] = math.nan, math.inf, -math.inf, 0.0
    x[3] *= 1e-38
    out, expected = linear_grouped(x, *w, activation_bits=8), ref.linear_grouped(x, *w, activation_bits=8)
    for row in range(m):
        assert_close(out[row], expected[row], 1e-5)
    assert linear_grouped(x, *w)[0].isnan().all()


@pytest.mark.parametrize("row", [(math.nan, 0.5), (math.inf, 0.5), (0.0, 0.0), (1e-38, 3e-39)])
def test_special_values_of_one_row(row):
    w = weight(20, 64, 32, 4)
    x = torch.randn(1, 64).sign() * 1e-39
    x[0, 3], x[0, 40] = row
    assert_close(linear_grouped(x, *w, activation_bits=8), ref.linear_grouped(x, *w, activation_bits=8), 1e-5)
    assert linear_grouped(x, *w)[0].isfinite().all() == math.isfinite(row[0])


def test_one_hot_activations_decode_the_weights():
    for bits, group in itertools.product((4, 8), (32, 64)):
        w = weight(40, 64, group, bits)
        assert torch.equal(
            linear_grouped(torch.eye(64), *w, activation_bits=8).T.sign(), dequantize_groups(*w).sign()
        )
        half = linear_grouped(torch.eye(64).half(), *w)
        assert torch.equal(half.T, dequantize_groups(*w).half())


def test_strides_and_empty():
    packed, scale, offset, group, bits = weight(40, 128, 32, 4)
    x, residual = torch.randn(128, 6).T, torch.randn(20, 6).T
    rows = (packed[::2], scale[::2], offset[::2], group, bits)
    check(x, rows, residual=residual, bias=torch.randn(40)[::2])
    assert linear_grouped(torch.randn(0, 128), packed, scale, offset, group, bits).shape == (0, 40)
    assert linear_grouped(torch.randn(3, 128), packed[:0], scale[:0], None, group, bits).shape == (3, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(4, 63)}, "x must be float32, float16 or bfloat16 \\[..., K\\] with K = 64"),
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"packed": torch.ones(5, 32)}, "packed must be uint8"),
        ({"group_size": 48}, "group_size must be a multiple of 32"),
        ({"scale": torch.ones(5, 3)}, "scale must be \\[N"),
        ({"scale": torch.ones(5, 2).int()}, "scale must be float32 or float16"),
        ({"offset": torch.ones(5, 2).half()}, "offset must have the shape"),
        ({"bias": torch.ones(4)}, "bias must be"),
        ({"residual": torch.ones(4, 4)}, "residual must be"),
        ({"activation": "tanh"}, "activation must be none"),
        ({"activation_bits": 4}, "activation_bits must be 8 or 16"),
        ({"out_dtype": torch.int8}, "out_dtype must be float32"),
    ],
)
def test_refuses(change, message):
    given = {
        "x": torch.ones(4, 64),
        "packed": torch.ones(5, 32, dtype=torch.uint8),
        "scale": torch.ones(5, 2),
    }
    with pytest.raises(RuntimeError, match=f"^linear_grouped: {message}"):
        linear_grouped(**given | {"offset": None, "group_size": 32, "bits": 4} | change)
