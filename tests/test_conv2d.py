import pytest
import torch
from torch import nn

from conftest import forced, variants
from conv2d_cases import operands, window
from narrowcast.kernels.conv2d import conv2d_ref as ref
from narrowcast.kernels.linear_int8.linear_int8_ref import ACTIVATIONS
from narrowcast.runtime import Executor
from tolerances import BOUND, assert_close

ops = torch.ops.narrowcast
#: A kernel of conv2d's own list with one of linear's, which does the products.
KERNELS = [(v, v) for v in variants("conv2d")] + [("avx512", v) for v in variants("linear")[:1]]
KERNELS = [(c, v) for c, v in KERNELS if c in variants("conv2d")]
DTYPES = list(BOUND)
CASES = [  # input shape, outputs, groups, kernel, stride, padding, dilation
    ((1, 3, 17, 19), 5, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 67, 5, 7), 70, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    ((2, 13, 9, 8), 17, 1, (1, 1), (2, 1), (1, 0), (1, 1)),
    ((1, 40, 23, 29), 131, 1, (3, 2), (1, 1), (1, 2), (1, 1)),
    ((1, 5, 12, 11), 7, 1, (3, 3), (1, 2), (4, 5), (2, 3)),
    ((1, 67, 16, 25), 67, 67, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 37, 9, 11), 37, 37, (5, 5), (2, 2), (2, 2), (1, 1)),
    ((1, 18, 8, 10), 18, 18, (3, 4), (1, 3), (5, 4), (2, 3)),
    ((1, 6, 7, 7), 18, 6, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 12, 17, 13), 20, 4, (3, 3), (2, 1), (1, 1), (1, 2)),
    ((2, 12, 9, 7), 8, 4, (3, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 3, 18, 16), 6, 1, (3, 3), (2, 2), (0, 0, 1, 1), (1, 1)),
    ((2, 5, 9, 7), 33, 1, (2, 3), (1, 2), (1, 0, 3, 4), (2, 1)),
    ((1, 19, 10, 14), 19, 19, (5, 5), (2, 2), (1, 2, 2, 1), (1, 1)),
    ((2, 3, 30, 41), 97, 1, (7, 7), (2, 2), (3, 3, 3, 2), (1, 1)),
    ((1, 1, 1, 1), 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 2, 1, 1), 3, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values(kernel, dtype, case):
    x, weight = operands(case, dtype)
    bias = torch.randn(case[1])
    plain = ref.conv2d(x, weight, bias, **window(case))
    residual = torch.randn(plain.shape).to(dtype)
    rest = {"activation": "relu6", "residual": residual, "post_activation": "relu"}
    with forced("conv2d", kernel[0]), forced("linear", kernel[1]):
        out = ops.conv2d(x, weight, bias, **window(case))
        full = ops.conv2d(x, weight, bias, **window(case), **rest)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, plain)
    assert_close(full, ref.conv2d(x, weight, bias, **window(case), **rest))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(kernel, activation):
    for case in (CASES[3], CASES[5]):
        x, weight = operands(case, torch.float32)
        with forced("conv2d", kernel[0]), forced("linear", kernel[1]):
            out = ops.conv2d(x, weight, None, **window(case), activation=activation)
        assert_close(out, ref.conv2d(x, weight, None, **window(case), activation=activation), 4e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_infinity_pass_through(kernel):
    for groups in (1, 20):
        x, weight = torch.zeros(1, 20, 9, 9), torch.ones(20, 20 // groups, 3, 3)
        x[0, :, 1, 1], x[0, :, 7, 7] = float("nan"), float("inf")
        with forced("conv2d", kernel[0]), forced("linear", kernel[1]):
            for activation in ("none", "relu"):
                out = ops.conv2d(x, weight, None, groups=groups, activation=activation)
                assert out[..., 0, 0].isnan().all() and out[..., 6, 6].isinf().all()
                assert (out[..., 3, 3] == 0).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5], CASES[9]])
def test_any_strides(case):
    x, weight = operands(case, torch.float32)
    expected = ref.conv2d(x, weight, **window(case))
    wide = torch.zeros(*x.shape[:2], x.shape[2] * 2, x.shape[3] + 3)
    wide[:, :, ::2, 1:-2] = x
    backwards = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for y in (x.contiguous(), wide[:, :, ::2, 1:-2], x.transpose(2, 3).contiguous().transpose(2, 3)):
        for w in (weight, weight.to(memory_format=torch.channels_last), backwards):
            assert_close(ops.conv2d(y, w, **window(case)), expected)
    one = x[:, :1].expand(x.shape)
    assert_close(ops.conv2d(one, weight, **window(case)), ref.conv2d(one, weight, **window(case)))
    residual, bias = torch.randn(1, case[1], 1, 1).expand(expected.shape), torch.randn(2 * case[1])[::2]
    assert_close(
        ops.conv2d(x, weight, bias, **window(case), residual=residual),
        ref.conv2d(x, weight, bias, **window(case), residual=residual),
    )


def test_empty():
    x, weight = operands(CASES[0], torch.float32)
    assert ops.conv2d(x[:0], weight).shape == (0, 5, 15, 17)
    assert ops.conv2d(x, weight[:0]).shape == (1, 0, 15, 17)
    bias = torch.randn(5)
    for kernel in (1, 3):
        out = ops.conv2d(x[:, :0], weight[:, :0, :kernel, :kernel], bias)
        assert torch.equal(out, bias.view(5, 1, 1).expand(out.shape))


def test_opcheck_and_compile():
    for case in (CASES[0], CASES[5]):
        x, weight = operands(case, torch.float32)
        torch.library.opcheck(ops.conv2d.default, (x, weight, torch.randn(case[1])), window(case))
    f = torch.compile(lambda y: ops.conv2d(y, weight, groups=67) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(x), ops.conv2d(x, weight, groups=67) + 1)


class Block(nn.Module):
    """Stem, depthwise and pointwise, a residual, and a weight that is computed."""

    def __init__(self):
        super().__init__()
        for name, shape in {"a": (24, 3, 3, 3), "b": (24, 1, 5, 5), "c": (24, 24, 1, 1)}.items():
            self.register_buffer(name, torch.randn(shape) / 5)
        self.register_buffer("bias", torch.randn(24))

    def forward(self, x):
        y = ops.conv2d(x, self.a, self.bias, [2, 2], [1, 1], activation="relu6")
        z = ops.conv2d(y, self.b, None, [1, 1], [2, 2], [1, 1], 24, "relu")
        z = ops.conv2d(z, self.c, self.bias, residual=y)
        return ops.conv2d(z, x[:1, :1, :1, :1] + self.c, residual=z.flip(3), post_activation="relu")


@pytest.mark.parametrize("channels_last", [False, True])
def test_steps(channels_last):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    block = Block()
    x = torch.randn(2, 3, 21, 18).to(memory_format=memory)
    exe = Executor(torch.export.export(block, (x,)).module(check_guards=False), device="cpu")
    rows = [r for r in exe.explain(x).rows if r.op == "conv2d"]
    assert [r.backend.startswith("native") for r in rows] == [True] * 4
    for _ in range(2):
        exe.program(x).arena_tensor.fill_(0xFF)
        assert torch.equal(exe(x), block(x))
        x = torch.randn(2, 3, 21, 18).to(memory_format=memory)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(1, 4, 8, 8, dtype=torch.float64)}, "x must be float32"),
        ({"x": torch.ones(4, 8, 8)}, r"x must be \[N, C, H, W\]"),
        ({"x": torch.ones(1, 4, 8, 0)}, r"x must be \[N, C, H, W\]"),
        ({"weight": torch.ones(6, 3, 3, 3)}, "weight must be float32"),
        ({"weight": torch.ones(6, 4, 0, 3)}, "weight must be float32"),
        ({"weight": torch.ones(6, 4, 3)}, "weight must be float32"),
        ({"weight": torch.ones(6, 4, 3, 3).half()}, "weight must be float32"),
        ({"weight": torch.ones(5, 2, 3, 3), "groups": 2}, "weight must be float32"),
        ({"groups": 0}, "groups must divide C = 4"),
        ({"groups": 3}, "groups must divide C = 4"),
        ({"bias": torch.ones(5)}, "bias must be"),
        ({"bias": torch.ones(6, dtype=torch.int32)}, "bias must be"),
        ({"residual": torch.ones(1, 6, 6, 5)}, "residual must be"),
        ({"residual": torch.ones(6, 6, 6)}, "residual must be"),
        ({"stride": [0, 1]}, "stride must be 2 numbers from 1"),
        ({"padding": [-1, 0]}, "padding must be 2 or 4 numbers from 0"),
        ({"padding": [1, 2, 3]}, "padding must be 2 or 4 numbers"),
        ({"padding": [1, 2, 3, -1]}, "padding must be 2 or 4 numbers from 0"),
        ({"dilation": [2**61, 1]}, "dilation must be 2 numbers"),
        ({"dilation": [4, 1]}, "weight must fit the padded image"),
        ({"activation": "swish"}, "activation must be none, relu"),
        ({"post_activation": "tanh"}, "post_activation must be none, relu"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.ones(1, 4, 8, 8), "weight": torch.ones(6, 4, 3, 3)} | change
    with pytest.raises(RuntimeError, match=f"conv2d: {message}"):
        ops.conv2d(**arguments)


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.conv2d(torch.ones(1, 4, 8, 8, requires_grad=True), torch.ones(6, 4, 3, 3))
