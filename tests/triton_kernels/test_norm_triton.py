import math

import pytest
import torch

from conftest import LOADED, STORED
from narrowcast.kernels.norm import norm_ref as ref
from narrowcast.kernels.norm import norm_triton as ours
from narrowcast.kernels.quantize import nan_count, quantize_triton
from norm_cases import assert_quantised, operands
from tolerances import assert_close

SHAPES = [(1, 1), (3, 7), (2, 3, 32), (5, 97), (17, 384), (1, 1030), (2, 16400)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_and_add(dtype, shape):
    for parameter_dtype in LOADED:
        x, residual, w, b = operands(shape, dtype, parameter_dtype)
        total = x.double() + residual.double()
        assert_close(ours.rms_norm(x, w, 1e-5), ref.rms_norm(x, w, 1e-5))
        y, s = ours.add_rms_norm(x, residual, w, 1e-5)
        assert_close(y, ref.rms_norm(total, w, 1e-5))
        assert torch.equal(s, x + residual)
        if shape[-1] == 1:  # a single value has no variance: the result is bias, exactly
            assert torch.equal(ours.layer_norm(x, w, b, 1e-5), b.to(dtype).expand(shape))
            continue
        for weight, bias in ((w, b), (w, None), (None, b), (None, None)):
            assert_close(ours.layer_norm(x, weight, bias, 1e-5), ref.layer_norm(x, weight, bias, 1e-5))
        y, s = ours.add_layer_norm(x, residual, w, b, 1e-5)
        assert_close(y, ref.layer_norm(total, w, b, 1e-5))
        assert torch.equal(s, x + residual)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "shape, group",
    [((3, 7), 0), ((2, 3, 64), 32), ((17, 384), 0), ((4, 96), 48), ((5, 96), 32), ((2, 16400), 0)],
)
def test_int8(dtype, shape, group):
    x, residual, w, b = operands(shape, dtype)
    total = x.double() + residual.double()
    assert_quantised(*ours.rms_norm_int8(x, w, 1e-5, group), ref.rms_norm(x, w, 1e-5), group)
    q, scale, s = ours.add_rms_norm_int8(x, residual, w, 1e-5, group)
    assert_quantised(q, scale, ref.rms_norm(total, w, 1e-5), group)
    assert torch.equal(s, x + residual)
    assert_quantised(*ours.layer_norm_int8(x, w, b, 1e-5, group), ref.layer_norm(x, w, b, 1e-5), group)
    q, scale, y = ours.add_layer_norm_int8(x, residual, w, b, 1e-5, group)
    expected = ref.layer_norm(total, w, b, 1e-5)
    assert_quantised(q, scale, expected, group)
    assert_close(y, expected)


def test_int8_is_quantize_of_the_float_norm():
    """In float32, where nothing is rounded between them, the fused form equals the two ops bit for bit."""
    x, residual, w, b = operands((9, 192), torch.float32)
    for group in (0, 64, 48):
        for fused, y in (
            (ours.rms_norm_int8(x, w, 1e-6, group), ours.rms_norm(x, w, 1e-6)),
            (
                ours.add_layer_norm_int8(x, residual, w, b, 1e-6, group),
                ours.add_layer_norm(x, residual, w, b, 1e-6)[0],
            ),
        ):
            q, scale = quantize_triton.quantize_int8(y, group)
            assert torch.equal(fused[0], q) and torch.equal(fused[1], scale)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("columns", [768, 16500])
def test_large_mean_and_non_finite(columns):
    x = torch.randn(4, columns) + 1000  # the variance must come from centred values
    assert_close(ours.layer_norm(x, None, None, 1e-5), ref.layer_norm(x, None, None, 1e-5), 1e-4)
    x[1, 5], x[2, 700] = math.nan, math.inf
    for y in (ours.layer_norm(x, None, None, 1e-5), ours.rms_norm(x, torch.ones(columns), 1e-5)):
        assert y[1].isnan().all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()
    nan_count(reset=True)
    q, scale = ours.layer_norm_int8(x, None, None, 1e-5)
    assert nan_count() == 2 * columns and (q[1] == 0).all() and scale[1] == 1


def test_strided_expanded_empty():
    x, residual, w, b = operands((6, 128), torch.float32)
    for y in (
        x[::2, :64],
        x[:, 64:],
        x[0, :64].expand(4, 64),
        x[:, ::2],
        x[:64].t()[:64, :6].t(),
        x[:0, :64],
    ):
        assert_close(ours.rms_norm(y, w[::2], 1e-5), ref.rms_norm(y, w[::2], 1e-5))
        wide = b[0].expand(64)
        assert_close(ours.layer_norm(y, w[:64], wide, 1e-5), ref.layer_norm(y, w[:64], wide, 1e-5))
    _, s = ours.add_rms_norm(x[:, ::2], residual[:, 64:], w[:64], 1e-5)
    assert torch.equal(s, x[:, ::2] + residual[:, 64:])
    assert ours.rms_norm(x.new_empty(3, 0), w[:0], 1e-5).shape == (3, 0)
    assert ours.rms_norm_int8(x.new_empty(3, 0), w[:0], 1e-5)[1].tolist() == [1, 1, 1]
    assert_close(ours.rms_norm(x[0], w, 1e-5), ref.rms_norm(x[0], w, 1e-5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, "x must be float32"),
        ({"x": torch.tensor(1.0)}, "x must be float32"),
        ({"residual": torch.ones(3, 64)}, "residual must have the dtype and shape of x"),
        ({"residual": torch.ones(2, 64, dtype=torch.float16)}, "residual must have the dtype"),
        ({"weight": torch.ones(63)}, r"weight must be .* \[64\]"),
        ({"weight": torch.ones(1, 64)}, r"weight must be .* \[64\]"),
        ({"bias": torch.ones(64, dtype=torch.int32)}, "bias must be float32"),
        ({"bias": torch.ones(64, dtype=torch.float16)}, "bias must have the dtype of weight"),
        ({"bias": torch.ones(64, device="meta")}, "bias must be on"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"group_size": 7}, "group_size must be 0"),
        ({"group_size": -64}, "group_size must be 0"),
    ],
)
def test_bad_input(change, message):
    x = torch.ones(2, 64)
    change = {
        k: v.to(x.device) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in change.items()
    }
    given = {"x": x, "residual": x, "weight": x[0], "bias": x[0], "eps": 1e-5, "group_size": 0}
    with pytest.raises(RuntimeError, match=f"add_layer_norm_int8: {message}"):
        ours.add_layer_norm_int8(**(given | change))
