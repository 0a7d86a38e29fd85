import pytest
import torch

from conftest import forced, variants
from narrowcast.kernels.linear import linear_ref as ref
from narrowcast.kernels.linear_int8.linear_int8_ref import ACTIVATIONS
from steps import run_step
from tolerances import BOUND, assert_close

ops = torch.ops.narrowcast
VARIANTS = variants("linear")
DTYPES = list(BOUND)
SHAPES = [
    (1, 1, 1),
    (2, 17, 3),
    (4, 64, 64),
    (5, 65, 129),
    (13, 3, 257),
    (101, 131, 95),
    (97, 40, 2100),
]


def operands(m, n, k, dtype):
    return torch.randn(m, k).to(dtype), (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_products(variant, dtype, m, n, k):
    x, weight = operands(m, n, k, dtype)
    bias, residual = torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    with forced("linear", variant):
        out = ops.linear(x, weight, bias, "relu", residual, torch.float32, post_activation="relu6")
    assert_close(out, ref.linear(x, weight, bias, "relu", residual, "relu6"), 4e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_and_dtypes(variant, dtype, out_dtype, activation):
    x, weight = operands(7, 83, 70, dtype)
    bias, residual = torch.randn(83), torch.randn(7, 83).to(out_dtype)
    with forced("linear", variant):
        out = ops.linear(x, weight, bias, activation, residual, out_dtype)
    assert out.dtype == out_dtype
    assert_close(out, ref.linear(x, weight, bias, activation, residual))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_infinity_pass_through(variant):
    x, weight = torch.zeros(3, 40), torch.ones(20, 40)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    with forced("linear", variant):
        for activation in ("none", "relu", "silu", "gelu", "gelu_tanh"):
            out = ops.linear(x, weight, None, activation)
            assert out[0].isnan().all() and out[1].isinf().all() and (out[2] == 0).all()


def test_views_are_read_in_place_or_copied():
    x, weight = operands(12, 40, 64, torch.float32)
    residual, wide = torch.randn(12, 90)[:, 7:47], torch.zeros(40, 100)
    wide[:, 3:67] = weight
    expected = ref.linear(x[::2], weight, residual=residual[::2])
    for w in (weight, wide[:, 3:67], weight.T.contiguous().T):
        assert_close(ops.linear(x[::2], w, residual=residual[::2]), expected)
    assert_close(ops.linear(x[:1].expand(8, 64), weight), ref.linear(x[:1], weight).expand(8, 40))
    assert_close(ops.linear(x.T.contiguous().T, weight), ref.linear(x, weight))


def test_shapes_and_empty():
    x, weight = operands(24, 10, 8, torch.float32)
    cube = ops.linear(x.view(2, 3, 4, 8), weight)
    assert torch.equal(cube.view(24, 10), ops.linear(x, weight))
    assert_close(ops.linear(x[0], weight), cube[0, 0, 0])
    assert ops.linear(x[:0], weight).shape == (0, 10)
    assert ops.linear(x, weight[:0]).shape == (24, 0)
    bias = torch.randn(10)
    assert torch.equal(ops.linear(x[:, :0], weight[:, :0], bias), bias.expand(24, 10))


def test_out():
    x, weight = operands(4, 10, 8, torch.float32)
    out = torch.full((4, 10), float("nan"))
    ops.linear.out(x, weight, out=out)
    assert torch.equal(out, ops.linear(x, weight))
    doubled = out * 2
    ops.linear.out(x, weight, residual=out, out=out)  # in place is allowed
    assert torch.equal(out, doubled)
    for bad, message in (
        (torch.empty(4, 11), "out must be"),
        (torch.empty(10, 4).T, "out must be contiguous"),
        (torch.empty(4, 10, dtype=torch.int8), "out_dtype must be"),
        (x.view(-1)[:1].expand(4, 10), "out must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.linear.out(x, weight, out=bad)
    memory = torch.zeros(60)
    with pytest.raises(RuntimeError, match="out must not overlap"):
        ops.linear.out(memory[10:42].view(4, 8), weight, out=memory[:40].view(4, 10))


def test_opcheck_and_compile():
    x, weight = operands(4, 10, 32, torch.float32)
    bias = torch.randn(10)
    torch.library.opcheck(ops.linear.default, (x, weight, bias, "gelu", torch.randn(4, 10)))
    torch.library.opcheck(ops.linear.out, (x, weight, bias), {"out": torch.empty(4, 10)})
    compiled = torch.compile(lambda *a: ops.linear(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), ops.linear(x, weight, bias) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(4, 32, dtype=torch.float64)}, "x must be float32"),
        ({"x": torch.ones(())}, "x must be float32"),
        ({"x": torch.ones(4, 31)}, "weight must be float32"),
        ({"weight": torch.ones(10, 32, dtype=torch.float16)}, "weight must be float32"),
        ({"weight": torch.ones(32)}, "weight must be float32"),
        ({"bias": torch.ones(9)}, "bias must be"),
        ({"bias": torch.ones(10, dtype=torch.int32)}, "bias must be"),
        ({"residual": torch.ones(4, 9)}, "residual must be"),
        ({"residual": torch.ones(10)}, "residual must be"),
        ({"activation": "swish"}, "activation must be none, relu"),
        ({"post_activation": "tanh"}, "post_activation must be none, relu"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
    ],
)
def test_bad_input(change, message):
    x, weight = operands(4, 10, 32, torch.float32)
    with pytest.raises(RuntimeError, match=f"linear: {message}"):
        ops.linear(**({"x": x, "weight": weight} | change))


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.linear(torch.randn(4, 32, requires_grad=True), torch.ones(3, 32))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k", [(1, 70, 33), (19, 65, 64), (100, 129, 1100)])
def test_packed_weights(variant, dtype, m, n, k):
    x, weight = operands(m, n, k, dtype)
    with forced("linear", variant):
        out = ops._linear_packed(x, ops._linear_pack(weight), n, out_dtype=torch.float32)
    assert_close(out, ref.linear(x, weight), 4e-6)


def test_foreign_panels_are_refused():
    x, packed = torch.randn(4, 32), ops._linear_pack(torch.randn(10, 32))
    for bad in (packed[:-1], packed.clone().fill_(0), packed.view(torch.int8)):
        with pytest.raises(RuntimeError, match="linear: packed must be weights"):
            ops._linear_packed(x, bad, 10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [False, True])
def test_step(variant, dtype, constant):
    for m in (3, 130):
        x, weight = operands(m, 70, 95, dtype)
        bias, residual = torch.randn(70), torch.randn(m, 70)
        out = torch.full((m, 70), float("nan"), dtype=dtype)
        with forced("linear", variant):
            run_step("linear", [x, weight, bias, residual], [out], [False, constant, True, False],
                     times=2, activation="gelu", post_activation="relu")  # fmt: skip
        assert_close(out, ref.linear(x, weight, bias, "gelu", residual, "relu"))


def test_step_checks_its_operands():
    x, weight = operands(4, 10, 32, torch.float32)
    for w, out, message in (
        (weight[:, 1:], torch.empty(4, 10), "weight must be"),
        (weight.T.contiguous().T, torch.empty(4, 10), "evenly spaced rows"),
        (weight, torch.empty(4, 9), "out must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_step("linear", [x, w, None, None], [out])
