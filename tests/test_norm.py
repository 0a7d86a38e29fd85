import math

import pytest
import torch

from conftest import forced, variants
from narrowcast.kernels.norm import norm_ref as ref
from norm_cases import assert_quantised, operands
from tolerances import assert_close

ops = torch.ops.narrowcast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (2, 3, 32), (5, 97), (17, 384), (1, 1030), (33, 64)]


@pytest.mark.parametrize("variant", variants("norm"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_and_add(variant, dtype, shape):
    for parameter_dtype in DTYPES:
        x, residual, w, b = operands(shape, dtype, parameter_dtype)
        total = x.double() + residual.double()
        with forced("norm", variant):
            assert_close(ops.rms_norm(x, w, 1e-5), ref.rms_norm(x, w, 1e-5))
            y, s = ops.add_rms_norm(x, residual, w, 1e-5)
            assert_close(y, ref.rms_norm(total, w, 1e-5))
            assert torch.equal(s, x + residual)
            if shape[-1] == 1:  # a single value has no variance: the result is bias, exactly
                assert torch.equal(ops.layer_norm(x, w, b, 1e-5), b.to(dtype).expand(shape))
                continue
            for weight, bias in ((w, b), (w, None), (None, b), (None, None)):
                assert_close(ops.layer_norm(x, weight, bias, 1e-5), ref.layer_norm(x, weight, bias, 1e-5))
            y, s = ops.add_layer_norm(x, residual, w, b, 1e-5)
            assert_close(y, ref.layer_norm(total, w, b, 1e-5))
            assert torch.equal(s, x + residual)


@pytest.mark.parametrize("variant", variants("norm"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, group", [((3, 7), 0), ((2, 3, 64), 32), ((17, 384), 0), ((4, 96), 48)])
def test_int8(variant, dtype, shape, group):
    x, residual, w, b = operands(shape, dtype)
    total = x.double() + residual.double()
    with forced("norm", variant):
        assert_quantised(*ops.rms_norm_int8(x, w, 1e-5, group), ref.rms_norm(x, w, 1e-5), group)
        q, scale, s = ops.add_rms_norm_int8(x, residual, w, 1e-5, group)
        assert_quantised(q, scale, ref.rms_norm(total, w, 1e-5), group)
        assert torch.equal(s, x + residual)
        y = ref.layer_norm(x, w, b, 1e-5)
        assert_quantised(*ops.layer_norm_int8(x, w, b, 1e-5, group), y, group)
        q, scale, y = ops.add_layer_norm_int8(x, residual, w, b, 1e-5, group)
        expected = ref.layer_norm(total, w, b, 1e-5)
        assert_quantised(q, scale, expected, group)
        assert_close(y, expected)


@pytest.mark.parametrize("variant", variants("norm"))
def test_int8_is_quantize_of_the_float_norm(variant):
    """In float32, where nothing is rounded between them, the fused form equals the two ops bit for bit."""
    x, residual, w, b = operands((9, 192), torch.float32)
    with forced("norm", variant):
        for fused, y in (
            (ops.rms_norm_int8(x, w, 1e-6, 64), ops.rms_norm(x, w, 1e-6)),
            (
                ops.add_layer_norm_int8(x, residual, w, b, 1e-6, 64),
                ops.add_layer_norm(x, residual, w, b, 1e-6)[0],
            ),
        ):
            q, scale = ops.quantize_int8(y, 64)
            assert torch.equal(fused[0], q) and torch.equal(fused[1], scale)


@pytest.mark.parametrize("variant", variants("norm"))
def test_large_mean_and_non_finite(variant):
    with forced("norm", variant):
        x = torch.randn(4, 768) + 1000  # the variance must come from centred values
        assert_close(ops.layer_norm(x, None, None, 1e-5), ref.layer_norm(x, None, None, 1e-5), 1e-4)
        x[1, 5], x[2, 700] = math.nan, math.inf
        y = ops.layer_norm(x, None, None, 1e-5)
        assert y[1].isnan().all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()
        ops.nan_count(reset=True)
        q, scale = ops.layer_norm_int8(x, None, None, 1e-5)
        assert ops.nan_count() == 2 * 768 and (q[1] == 0).all() and scale[1] == 1


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
        assert_close(ops.rms_norm(y, w[::2], 1e-5), ref.rms_norm(y, w[::2], 1e-5))
        assert_close(
            ops.layer_norm(y, w[:64], b[0].expand(64), 1e-5), ref.layer_norm(y, w[:64], b[0].expand(64), 1e-5)
        )
    total, s = ops.add_rms_norm(x[:, ::2], residual[:, 64:], w[:64], 1e-5)
    assert torch.equal(s, x[:, ::2] + residual[:, 64:])
    assert ops.rms_norm(x.new_empty(3, 0), w[:0], 1e-5).shape == (3, 0)
    assert ops.rms_norm_int8(x.new_empty(3, 0), w[:0], 1e-5)[1].tolist() == [1, 1, 1]
    assert_close(ops.rms_norm(x[0], w, 1e-5), ref.rms_norm(x[0], w, 1e-5))


def test_out():
    x, _, w, b = operands((5, 96), torch.float16)
    out = torch.full_like(x, math.nan)
    ops.rms_norm.out(x, w, 1e-5, out=out)
    assert torch.equal(out, ops.rms_norm(x, w, 1e-5))
    ops.layer_norm.out(x, w, b, 1e-5, out=out)
    assert torch.equal(out, ops.layer_norm(x, w, b, 1e-5))
    for bad, message in (
        (out.float(), "out must be float16"),
        (out[:4], "out must be float16"),
        (torch.empty(96, 5, dtype=torch.float16).t(), "out must be contiguous"),
        (x, "out must not overlap"),
    ):
        with pytest.raises(RuntimeError, match=f"rms_norm: {message}"):
            ops.rms_norm.out(x, w, 1e-5, out=bad)


def test_opcheck_and_compile():
    x, residual, w, b = operands((4, 64), torch.float32)
    for op, arguments in (
        (ops.rms_norm, (x, w, 1e-5)),
        (ops.add_rms_norm, (x, residual, w, 1e-5)),
        (ops.rms_norm_int8, (x, w, 1e-5, 32)),
        (ops.add_rms_norm_int8, (x, residual, w, 1e-5)),
        (ops.layer_norm, (x, w, None, 1e-5)),
        (ops.add_layer_norm, (x, residual, w, b, 1e-5)),
        (ops.layer_norm_int8, (x, None, None, 1e-5, 32)),
        (ops.add_layer_norm_int8, (x, residual, w, b, 1e-5)),
    ):
        torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(ops.rms_norm.out, (x, w, 1e-5), {"out": torch.empty_like(x)})
    torch.library.opcheck(ops.layer_norm.out, (x, w, b, 1e-5), {"out": torch.empty_like(x)})
    f = torch.compile(lambda y: ops.rms_norm(y, w, 1e-5) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(x), ops.rms_norm(x, w, 1e-5) + 1)


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
        ({"eps": -1.0}, "eps must not be negative"),
        ({"group_size": 7}, "group_size must be 0"),
        ({"group_size": -64}, "group_size must be 0"),
    ],
)
def test_bad_input(change, message):
    x = torch.ones(2, 64)
    arguments = {"x": x, "residual": x, "weight": x[0], "bias": x[0], "eps": 1e-5, "group_size": 0}
    with pytest.raises(RuntimeError, match=f"add_layer_norm_int8: {message}"):
        ops.add_layer_norm_int8(**(arguments | change))
