import pytest
import torch

import narrowcast as nc
from conftest import forced, variants
from narrowcast.kernels.linear_int8 import linear_int8_ref as ref
from steps import run_step
from tolerances import BOUND, assert_close

ops = torch.ops.narrowcast
VARIANTS = variants("linear_int8")
SHAPES = [
    (1, 1, 1),
    (2, 17, 3),
    (3, 64, 64),
    (5, 65, 129),
    (7, 100, 66),
    (13, 3, 257),
    (101, 131, 96),
]


def operands(m, n, k, group_size=0, asymmetric=False):
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w_q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    x_scale = torch.rand(m, k // group_size) if group_size else torch.rand(m)
    zero = torch.randint(-128, 128, (m,), dtype=torch.int32) if asymmetric else None
    return x_q, x_scale / 50, w_q, torch.rand(n) / k, zero


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_exact_epilogues_are_bit_equal(variant, m, n, k):
    for asymmetric in (False, True):
        x_q, x_scale, w_q, w_scale, zero = operands(m, n, k, 0, asymmetric)
        bias, residual = torch.randn(n), torch.randn(m, n)
        for activation, post in (("none", "none"), ("relu", "relu6"), ("relu6", "relu")):
            with forced("linear_int8", variant):
                out = ops.linear_int8(
                    x_q,
                    x_scale,
                    w_q,
                    w_scale,
                    bias,
                    activation,
                    residual,
                    None,
                    zero,
                    post_activation=post,
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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", list(ref.ACTIVATIONS))
@pytest.mark.parametrize("dtype", list(BOUND))
def test_activations_and_dtypes(variant, activation, dtype):
    x_q, x_scale, w_q, w_scale, _ = operands(9, 83, 70)
    x_scale, w_scale = torch.tensor([0.01]), torch.tensor(0.02)
    bias, residual = torch.randn(83).to(dtype), torch.randn(9, 83).to(dtype)
    with forced("linear_int8", variant):
        out = ops.linear_int8(x_q, x_scale, w_q, w_scale, bias, activation, residual, dtype)
    assert out.dtype == dtype
    assert_close(out, ref.linear_int8(x_q, x_scale, w_q, w_scale, bias, activation, residual))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [32, 64, 96])
@pytest.mark.parametrize("m", [1, 4, 11])
def test_groups(variant, group_size, m):
    x_q, x_scale, w_q, w_scale, _ = operands(m, 77, 192, group_size)
    with forced("linear_int8", variant):
        out = ops.linear_int8(x_q, x_scale, w_q, w_scale, group_size=group_size)
    assert_close(out, ref.linear_int8(x_q, x_scale, w_q, w_scale, group_size=group_size))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_extreme_sums_do_not_overflow(variant, asymmetric):
    k = 140_003  # -128 * -128 * k is past 2^31
    x_q, w_q = (torch.full((r, k), -128, dtype=torch.int8) for r in (2, 3))
    scale, zero = torch.ones(1), torch.tensor([-3, 90], dtype=torch.int32) if asymmetric else None
    with forced("linear_int8", variant):
        out = ops.linear_int8(x_q, scale, w_q, scale, x_zero_point=zero)
    assert_close(out, ref.linear_int8(x_q, scale, w_q, scale, x_zero_point=zero))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, zero_point", [(torch.int8, 0), (torch.int8, -7), (torch.uint8, 128)])
def test_requantize(variant, dtype, zero_point):
    x_q, x_scale, w_q, w_scale, zero = operands(8, 70, 96, asymmetric=True)
    bias = torch.randn(70)
    bias[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    with forced("linear_int8", variant):
        out = ops.linear_int8_requantize(
            x_q, x_scale, w_q, w_scale, bias, "relu6", None, 0.0137, zero_point, dtype, zero
        )
    y = ref.linear_int8(x_q, x_scale, w_q, w_scale, bias, "relu6", None, zero, dtype=torch.float32)
    assert torch.equal(out, ref.requantise(y, 0.0137, zero_point, dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("group_size, asymmetric", [(0, False), (0, True), (32, False)])
def test_dynamic_is_quantise_then_linear(variant, dtype, group_size, asymmetric):
    x, (_, _, w_q, w_scale, _) = torch.randn(2, 5, 160).to(dtype), operands(1, 75, 160)
    if asymmetric:
        x = x + 1
    with forced("linear_int8", variant):
        out = ops.linear_dynamic_int8(x, w_q, w_scale, group_size=group_size, asymmetric=asymmetric)
    if asymmetric:
        x_q, x_scale, zero = ops.quantize_int8_asymmetric(x)
    else:
        (x_q, x_scale), zero = ops.quantize_int8(x, group_size), None
    with forced("linear_int8", variant):
        two_steps = ops.linear_int8(
            x_q, x_scale, w_q, w_scale, out_dtype=dtype, x_zero_point=zero, group_size=group_size
        )
    assert torch.equal(out, two_steps)
    exact = x.double() @ (w_q.double() * w_scale.double()[:, None]).T
    assert_close(out, exact, 0.03)


def test_dynamic_non_finite():
    x, w_q = torch.randn(3, 32), torch.randint(-127, 128, (4, 32), dtype=torch.int8)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    out = ops.linear_dynamic_int8(x, w_q, torch.ones(4))
    assert out.isfinite().all()
    with pytest.raises(RuntimeError, match="x must be finite"):
        ops.linear_dynamic_int8(x, w_q, torch.ones(4), strict=True)


def test_views_are_read_in_place_or_copied():
    x_q, x_scale, w_q, w_scale, _ = operands(12, 40, 64)
    bias, residual = torch.randn(80)[::2], torch.randn(12, 90)[:, 7:47]
    expected = ref.linear_int8(
        x_q[::2], x_scale[::2], w_q, w_scale, bias, residual=residual[::2], dtype=torch.float32
    )
    wide = torch.zeros(40, 100, dtype=torch.int8)
    wide[:, 3:67] = w_q
    for w in (w_q, wide[:, 3:67], w_q.T.contiguous().T):
        out = ops.linear_int8(x_q[::2], x_scale[::2], w, w_scale, bias, "none", residual[::2])
        assert torch.equal(out, expected)
    one = ops.linear_int8(x_q[:1].expand(4, 64), x_scale[:1].expand(4), w_q, w_scale)
    assert torch.equal(one, ops.linear_int8(x_q[:1], x_scale[:1], w_q, w_scale).expand(4, 40))


def test_shapes_and_empty():
    x_q, x_scale, w_q, w_scale, _ = operands(24, 10, 8)
    cube = ops.linear_int8(x_q.view(2, 3, 4, 8), x_scale.view(2, 3, 4), w_q, w_scale)
    assert torch.equal(cube.view(24, 10), ops.linear_int8(x_q, x_scale, w_q, w_scale))
    vector = ops.linear_int8(x_q[0], x_scale[:1], w_q, w_scale)
    assert torch.equal(vector, cube[0, 0, 0])
    assert ops.linear_int8(x_q[:0], x_scale[:0], w_q, w_scale).shape == (0, 10)
    assert ops.linear_int8(x_q, x_scale, w_q[:0], w_scale[:0]).shape == (24, 0)
    bias = torch.randn(10)
    no_columns = ops.linear_int8(x_q[:, :0], x_scale, w_q[:, :0], w_scale, bias)
    assert torch.equal(no_columns, bias.expand(24, 10))
    assert ops.linear_dynamic_int8(torch.randn(0, 8), w_q, w_scale).shape == (0, 10)


def test_out_forms():
    x_q, x_scale, w_q, w_scale, _ = operands(4, 10, 8)
    out = torch.full((4, 10), float("nan"))
    ops.linear_int8.out(x_q, x_scale, w_q, w_scale, out=out)
    assert torch.equal(out, ops.linear_int8(x_q, x_scale, w_q, w_scale))
    doubled = out * 2
    ops.linear_int8.out(x_q, x_scale, w_q, w_scale, residual=out, out=out)  # in place is allowed
    assert torch.equal(out, doubled)
    x, half = torch.randn(4, 8), torch.empty(4, 10, dtype=torch.bfloat16)
    ops.linear_dynamic_int8.out(x, w_q, w_scale, out=half)
    assert torch.equal(half, ops.linear_dynamic_int8(x, w_q, w_scale, out_dtype=torch.bfloat16))
    for bad, message in (
        (torch.empty(4, 11), "out must be"),
        (torch.empty(10, 4).T, "out must be contiguous"),
        (torch.empty(4, 10, dtype=torch.int8), "out_dtype must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.linear_int8.out(x_q, x_scale, w_q, w_scale, out=bad)
    memory = torch.zeros(60)
    with pytest.raises(RuntimeError, match="out must not overlap"):
        ops.linear_int8.out(
            x_q,
            x_scale,
            w_q,
            w_scale,
            residual=memory[10:50].view(4, 10),
            out=memory[:40].view(4, 10),
        )


def test_opcheck_and_compile():
    x_q, x_scale, w_q, w_scale, zero = operands(4, 10, 32, asymmetric=True)
    bias, x = torch.randn(10), torch.randn(4, 32)
    inputs = (x_q, x_scale, w_q, w_scale, bias, "gelu", torch.randn(4, 10), torch.float16, zero)
    torch.library.opcheck(ops.linear_int8.default, inputs)
    torch.library.opcheck(ops.linear_dynamic_int8.default, (x, w_q, w_scale, bias))
    torch.library.opcheck(
        ops.linear_int8_requantize.default, (x_q, x_scale, w_q, w_scale, None, "none", None, 0.1)
    )
    torch.library.opcheck(ops.linear_int8.out, (x_q, x_scale, w_q, w_scale), {"out": torch.empty(4, 10)})
    torch.library.opcheck(ops.linear_dynamic_int8.out, (x, w_q, w_scale), {"out": torch.empty(4, 10)})
    compiled = torch.compile(lambda *a: ops.linear_dynamic_int8(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w_q, w_scale), ops.linear_dynamic_int8(x, w_q, w_scale) + 1)


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
    ],
)
def test_bad_input(change, message):
    x_q, x_scale, w_q, w_scale, _ = operands(4, 10, 32)
    arguments = {"x_q": x_q, "x_scale": x_scale, "w_q": w_q, "w_scale": w_scale} | change
    with pytest.raises(RuntimeError, match=f"linear_int8: {message}"):
        ops.linear_int8(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(4, 32, dtype=torch.int8)}, "x must be float32"),
        ({"group_size": 32, "asymmetric": True}, "asymmetric must be False"),
        ({"out_dtype": torch.float64}, "out_dtype must be"),
    ],
)
def test_dynamic_bad_input(change, message):
    _, _, w_q, w_scale, _ = operands(4, 10, 32)
    arguments = {"x": torch.randn(4, 32), "w_q": w_q, "w_scale": w_scale} | change
    with pytest.raises(RuntimeError, match=f"linear_dynamic_int8: {message}"):
        ops.linear_dynamic_int8(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"out_scale": 0.0}, "out_scale must be positive"),
        ({"out_scale": float("nan")}, "out_scale must be positive"),
        ({"out_zero_point": 128}, "out_zero_point must be within -128 and 127"),
        ({"out_dtype": torch.float32}, "out_dtype must be int8 or uint8"),
    ],
)
def test_requantize_bad_input(change, message):
    x_q, x_scale, w_q, w_scale, _ = operands(4, 10, 32)
    arguments = {"out_scale": 0.1} | change
    with pytest.raises(RuntimeError, match=f"linear_int8_requantize: {message}"):
        ops.linear_int8_requantize(x_q, x_scale, w_q, w_scale, None, "none", None, **arguments)


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.linear_dynamic_int8(
            torch.randn(4, 32, requires_grad=True),
            torch.ones(3, 32, dtype=torch.int8),
            torch.ones(3),
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"asymmetric": True}, {"group_size": 32}])
def test_layer(variant, options):
    linear = torch.nn.Linear(96, 70)
    layer = nc.nn.LinearInt8.from_float(linear, activation="relu", **options)
    x, residual = torch.randn(2, 5, 96), torch.randn(2, 5, 70)
    with torch.no_grad(), forced("linear_int8", variant):
        layer._panels = None  # variants differ in their panels
        out = layer(x, residual)
        expected = ops.linear_dynamic_int8(
            x, layer.weight, layer.weight_scale, layer.bias, "relu", residual, **options
        )
    assert torch.equal(out, expected)
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}


def test_layer_follows_its_weight_and_compiles():
    layer = nc.nn.LinearInt8.from_float(torch.nn.Linear(64, 10))
    x = torch.randn(3, 64)
    before = layer(x)
    other = nc.nn.LinearInt8.from_float(torch.nn.Linear(64, 10))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.inference_mode():  # whose tensors have no version counter
        inside = nc.nn.LinearInt8(layer.weight.clone(), layer.weight_scale, layer.bias)
        assert torch.equal(inside(x), layer(x))


@pytest.mark.parametrize(
    "weight, scale, options, message",
    [
        (torch.ones(4, 32), torch.ones(4), {}, "weight must be int8"),
        (torch.ones(4, 32, dtype=torch.int8), torch.ones(3), {}, "weight_scale must be"),
        (torch.ones(4, 32, dtype=torch.int8), torch.ones(4), {"group_size": 48}, "group_size must"),
        (
            torch.ones(4, 32, dtype=torch.int8),
            torch.ones(4),
            {"group_size": 32, "asymmetric": True},
            "asymmetric must",
        ),
    ],
)
def test_layer_bad_input(weight, scale, options, message):
    with pytest.raises(nc.ArgumentError, match=message):
        nc.nn.LinearInt8(weight, scale, **options)


def test_foreign_panels_are_refused():
    w_q, x = torch.ones(10, 32, dtype=torch.int8), torch.randn(4, 32)
    packed = ops._linear_int8_pack(w_q)
    for bad in (packed[:-1], packed[64:], packed.clone().fill_(0), packed.view(torch.int8)):
        with pytest.raises(RuntimeError, match="linear_dynamic_int8: packed must be weights"):
            ops._linear_dynamic_int8_packed(x, bad, 10, torch.ones(10))
    with pytest.raises(RuntimeError, match="packed must be weights"):
        ops._linear_dynamic_int8_packed(x, packed, 1 << 60, torch.ones(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("constant", [False, True])
def test_steps(variant, constant):
    for m, group_size in ((3, 0), (130, 0), (7, 32)):
        x_q, x_scale, w_q, w_scale, _ = operands(m, 70, 96, group_size)
        zero = None if group_size else torch.randint(-9, 9, (m,), dtype=torch.int32)
        bias, residual, x = torch.randn(70), torch.randn(m, 70), torch.randn(m, 96)
        out, q = torch.full((m, 70), float("nan")), torch.empty(m, 70, dtype=torch.uint8)
        dynamic = torch.full((m, 70), float("nan"), dtype=torch.float16)
        weights = [False, False, constant, constant, False, False, False]
        inputs, options = [x_q, x_scale, w_q, w_scale, bias, residual, zero], {"group_size": group_size}
        with forced("linear_int8", variant):
            run_step("linear_int8", inputs, [out], weights, times=2, activation="relu", **options)
            run_step("linear_int8_requantize", inputs, [q], weights, out_scale=0.02,
                     out_zero_point=3, **options)  # fmt: skip
            run_step("linear_dynamic_int8", [x, w_q, w_scale, bias, residual], [dynamic],
                     [False, constant, constant, False, False], times=2,
                     post_activation="relu", **options)  # fmt: skip
            expected = ops.linear_int8(*inputs[:5], "relu", residual, None, zero, **options)
            expected_q = ops.linear_int8_requantize(*inputs[:5], "none", residual, 0.02, 3,
                                                    torch.uint8, zero, **options)  # fmt: skip
            expected_dynamic = ops.linear_dynamic_int8(x, w_q, w_scale, bias, "none", residual,
                                                       torch.float16, post_activation="relu",
                                                       **options)  # fmt: skip
        assert torch.equal(out, expected) and torch.equal(q, expected_q)
        assert torch.equal(dynamic, expected_dynamic)


def test_step_checks_its_operands():
    x_q, x_scale, w_q, w_scale, _ = operands(4, 10, 32)
    rest = [None, None, None]
    for inputs, message in (
        ([x_q, x_scale[1:], w_q, w_scale, *rest], "x_scale must be"),
        ([x_q, x_scale, w_q.T.contiguous().T, w_scale, *rest], "evenly spaced rows"),
        ([x_q, x_scale, w_q[1:], w_scale, *rest], "w_scale must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_step("linear_int8", inputs, [torch.empty(4, 10)])
