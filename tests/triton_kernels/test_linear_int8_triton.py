import pytest
import torch

from conftest import STORED
from narrowcast.kernels.linear_int8 import linear_int8_ref as ref
from narrowcast.kernels.linear_int8 import linear_int8_triton as ours
from narrowcast.kernels.quantize import quantize_triton
from tolerances import assert_close

SHAPES = [(1, 1, 1), (2, 17, 3), (3, 64, 64), (7, 100, 266), (33, 70, 96), (70, 131, 140)]


def operands(m, n, k, group_size=0, asymmetric=False):
    x_q, w_q = (torch.randint(-128, 128, (r, k), dtype=torch.int8) for r in (m, n))
    x_scale = torch.rand(m, k // group_size) if group_size else torch.rand(m)
    zero = torch.randint(-128, 128, (m,), dtype=torch.int32) if asymmetric else None
    return x_q, x_scale / 50, w_q, torch.rand(n) / k, zero


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_exact_epilogues_are_bit_equal(m, n, k):
    bias, residual = torch.randn(n), torch.randn(m, n)
    for asymmetric, activation, post in (
        (False, "none", "none"),
        (True, "relu", "relu6"),
        (True, "relu6", "relu"),
    ):
        x_q, x_scale, w_q, w_scale, zero = operands(m, n, k, 0, asymmetric)
        out = ours.linear_int8(
            x_q, x_scale, w_q, w_scale, bias, activation, residual, None, zero, post_activation=post
        )
        expected = ref.linear_int8(
            x_q,
            x_scale,
            w_q,
            w_scale,
            bias,
            activation,
            residual,
            zero,
            post_activation=post,
            dtype=torch.float32,
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize("activation", list(ref.ACTIVATIONS))
@pytest.mark.parametrize("dtype", STORED)
def test_activations_and_dtypes(activation, dtype):
    x_q, _, w_q, _, _ = operands(9, 83, 70)
    x_scale, w_scale = torch.tensor([0.01]), torch.tensor(0.02)
    bias, residual = torch.randn(83).to(dtype), torch.randn(9, 83).to(dtype)
    out = ours.linear_int8(x_q, x_scale, w_q, w_scale, bias, activation, residual, dtype)
    assert out.dtype == dtype
    assert_close(out, ref.linear_int8(x_q, x_scale, w_q, w_scale, bias, activation, residual))


@pytest.mark.parametrize("group_size", [32, 64, 96])
@pytest.mark.parametrize("m", [1, 11, 40])
def test_groups(group_size, m):
    x_q, x_scale, w_q, w_scale, _ = operands(m, 77, 192, group_size)
    out = ours.linear_int8(x_q, x_scale, w_q, w_scale, group_size=group_size)
    assert_close(out, ref.linear_int8(x_q, x_scale, w_q, w_scale, group_size=group_size))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_extreme_sums_do_not_overflow(asymmetric):
    k = 140_003  # -128 * -128 * k is past 2^31
    x_q, w_q = (torch.full((r, k), -128, dtype=torch.int8) for r in (2, 3))
    scale, zero = torch.ones(1), torch.tensor([-3, 90], dtype=torch.int32) if asymmetric else None
    out = ours.linear_int8(x_q, scale, w_q, scale, x_zero_point=zero)
    assert_close(out, ref.linear_int8(x_q, scale, w_q, scale, x_zero_point=zero))


@pytest.mark.parametrize("dtype, zero_point", [(torch.int8, 0), (torch.int8, -7), (torch.uint8, 128)])
def test_requantize(dtype, zero_point):
    x_q, x_scale, w_q, w_scale, zero = operands(8, 70, 96, asymmetric=True)
    bias = torch.randn(70)
    bias[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    out = ours.linear_int8_requantize(
        x_q, x_scale, w_q, w_scale, bias, "relu6", None, 0.0137, zero_point, dtype, zero
    )
    y = ref.linear_int8(x_q, x_scale, w_q, w_scale, bias, "relu6", None, zero, dtype=torch.float32)
    assert torch.equal(out, ref.requantise(y, 0.0137, zero_point, dtype))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("group_size, asymmetric", [(0, False), (0, True), (32, False)])
def test_dynamic_is_quantise_then_linear(dtype, group_size, asymmetric):
    x, (_, _, w_q, w_scale, _) = torch.randn(2, 5, 160).to(dtype) + asymmetric, operands(1, 75, 160)
    out = ours.linear_dynamic_int8(x, w_q, w_scale, group_size=group_size, asymmetric=asymmetric)
    if asymmetric:
        x_q, x_scale, zero = quantize_triton.quantize_int8_asymmetric(x)
    else:
        (x_q, x_scale), zero = quantize_triton.quantize_int8(x, group_size), None
    two_steps = ours.linear_int8(
        x_q, x_scale, w_q, w_scale, out_dtype=dtype, x_zero_point=zero, group_size=group_size
    )
    assert torch.equal(out, two_steps)
    assert_close(out, x.double() @ (w_q.double() * w_scale.double()[:, None]).T, 0.03)


def test_dynamic_non_finite():
    x, w_q = torch.randn(3, 32), torch.randint(-127, 128, (4, 32), dtype=torch.int8)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    assert ours.linear_dynamic_int8(x, w_q, torch.ones(4)).isfinite().all()
    with pytest.raises(RuntimeError, match="linear_dynamic_int8: x must be finite"):
        ours.linear_dynamic_int8(x, w_q, torch.ones(4), strict=True)


def test_views_are_read_in_place_or_copied():
    x_q, x_scale, w_q, w_scale, _ = operands(12, 40, 64)
    bias, residual = torch.randn(80)[::2], torch.randn(12, 90)[:, 7:47]
    expected = ref.linear_int8(
        x_q[::2], x_scale[::2], w_q, w_scale, bias, residual=residual[::2], dtype=torch.float32
    )
    wide = torch.zeros(40, 100, dtype=torch.int8)
    wide[:, 3:67] = w_q
    for w in (w_q, wide[:, 3:67], w_q.T.contiguous().T):
        out = ours.linear_int8(x_q[::2], x_scale[::2], w, w_scale, bias, "none", residual[::2])
        assert torch.equal(out, expected)
    one = ours.linear_int8(x_q[:1].expand(4, 64), x_scale[:1].expand(4), w_q, w_scale)
    assert torch.equal(one, ours.linear_int8(x_q[:1], x_scale[:1], w_q, w_scale).expand(4, 40))


def test_shapes_and_empty():
    x_q, x_scale, w_q, w_scale, _ = operands(24, 10, 8)
    cube = ours.linear_int8(x_q.view(2, 3, 4, 8), x_scale.view(2, 3, 4), w_q, w_scale)
    assert torch.equal(cube.view(24, 10), ours.linear_int8(x_q, x_scale, w_q, w_scale))
    assert torch.equal(ours.linear_int8(x_q[0], x_scale[:1], w_q, w_scale), cube[0, 0, 0])
    assert ours.linear_int8(x_q[:0], x_scale[:0], w_q, w_scale).shape == (0, 10)
    assert ours.linear_int8(x_q, x_scale, w_q[:0], w_scale[:0]).shape == (24, 0)
    bias = torch.randn(10)
    for zero in (None, torch.ones(24, dtype=torch.int32)):
        no_columns = ours.linear_int8(x_q[:, :0], x_scale, w_q[:, :0], w_scale, bias, x_zero_point=zero)
        assert torch.equal(no_columns, bias.expand(24, 10))
    no_groups = ours.linear_int8(
        x_q[:, :0], x_scale.new_empty(24, 0), w_q[:, :0], w_scale, bias, group_size=32
    )
    assert torch.equal(no_groups, bias.expand(24, 10))
    assert ours.linear_dynamic_int8(torch.randn(0, 8), w_q, w_scale).shape == (0, 10)


def test_more_tiles_than_programs():
    """Persistent blocks take several tiles each; strips of tiles end unevenly."""
    x_q, x_scale, w_q, w_scale, _ = operands(64 * 9 + 5, 300, 33)
    out = ours.linear_int8(x_q, x_scale, w_q, w_scale)
    assert torch.equal(out, ref.linear_int8(x_q, x_scale, w_q, w_scale, dtype=torch.float32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_q": torch.ones(4, 32)}, "x_q must be int8"),
        ({"x_q": torch.ones(4, 31, dtype=torch.int8)}, "w_q must be"),
        ({"x_q": torch.ones((), dtype=torch.int8)}, "x must be"),
        ({"w_q": torch.ones(10, 32)}, "w_q must be int8"),
        ({"w_q": torch.ones(10, 4, 8, dtype=torch.int8)}, "w_q must be int8"),
        ({"x_scale": torch.ones(3)}, "x_scale must be"),
        ({"x_scale": torch.ones(4, dtype=torch.float64)}, "x_scale must be float32"),
        ({"x_scale": torch.ones(4, 2)}, "x_scale must be"),
        ({"w_scale": torch.ones(9)}, "w_scale must be"),
        ({"w_scale": torch.ones(10, dtype=torch.float16)}, "w_scale must be float32"),
        ({"bias": torch.ones(9)}, "bias must be"),
        ({"bias": torch.ones(10, dtype=torch.int32)}, "bias must be"),
        ({"residual": torch.ones(4, 9)}, "residual must be"),
        ({"residual": torch.ones(10)}, "residual must be"),
        ({"activation": "swish"}, "activation must be none, relu"),
        ({"post_activation": "tanh"}, "post_activation must be none, relu"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
        ({"group_size": 24}, "group_size must be"),
        ({"group_size": -32}, "group_size must be"),
        ({"group_size": 64}, "group_size must be"),
        ({"x_zero_point": torch.ones(4)}, "x_zero_point must be int32"),
        ({"x_zero_point": torch.ones(3, dtype=torch.int32)}, "x_zero_point must be int32"),
        ({"bias": torch.ones(10, device="meta")}, "bias must be on"),
        ({"w_q": torch.ones(10, 32, device="meta", dtype=torch.int8)}, "w_q must be on"),
    ],
)
def test_bad_input(change, message):
    x_q, x_scale, w_q, w_scale, _ = operands(4, 10, 32)
    arguments = {"x_q": x_q, "x_scale": x_scale, "w_q": w_q, "w_scale": w_scale}
    change = {
        k: v.to(x_q.device) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in change.items()
    }
    with pytest.raises(RuntimeError, match=f"linear_int8: {message}"):
        ours.linear_int8(**arguments | change)


def test_other_forms_refuse():
    x_q, x_scale, w_q, w_scale, _ = operands(4, 10, 32)
    for change, message in (
        ({"x": x_q}, "x must be float32"),
        ({"group_size": 32, "asymmetric": True}, "asymmetric must be False"),
        ({"out_dtype": torch.float64}, "out_dtype must be"),
    ):
        with pytest.raises(RuntimeError, match=f"linear_dynamic_int8: {message}"):
            ours.linear_dynamic_int8(**{"x": torch.randn(4, 32), "w_q": w_q, "w_scale": w_scale} | change)
    for change, message in (
        ({"out_scale": 0.0}, "out_scale must be positive"),
        ({"out_scale": float("nan")}, "out_scale must be positive"),
        ({"out_zero_point": 128}, "out_zero_point must be within -128 and 127"),
        ({"out_dtype": torch.float32}, "out_dtype must be int8 or uint8"),
    ):
        with pytest.raises(RuntimeError, match=f"linear_int8_requantize: {message}"):
            ours.linear_int8_requantize(
                x_q, x_scale, w_q, w_scale, None, "none", None, **{"out_scale": 0.1} | change
            )
