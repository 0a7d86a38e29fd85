import pytest
import torch

from conftest import STORED
from conv2d_cases import operands, window
from narrowcast.kernels.conv2d import conv2d_ref as ref
from narrowcast.kernels.conv2d.conv2d_triton import conv2d
from narrowcast.kernels.linear_int8.linear_int8_ref import ACTIVATIONS
from tolerances import assert_close

CASES = [  # input shape, outputs, groups, kernel, stride, padding, dilation
    ((1, 3, 9, 11), 5, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 67, 5, 7), 40, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    ((2, 40, 9, 8), 17, 1, (1, 1), (2, 1), (1, 0), (1, 1)),
    ((1, 40, 7, 6), 37, 1, (3, 2), (1, 1), (1, 2), (1, 1)),
    ((1, 64, 5, 5), 20, 1, (2, 2), (1, 1), (0, 0), (1, 1)),
    ((1, 5, 12, 11), 7, 1, (3, 3), (1, 2), (4, 5), (2, 3)),
    ((1, 67, 6, 9), 67, 67, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 18, 8, 10), 18, 18, (3, 4), (1, 3), (5, 4), (2, 3)),
    ((1, 6, 7, 7), 18, 6, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 12, 9, 7), 20, 4, (3, 3), (2, 1), (1, 1), (1, 2)),
    ((1, 70, 4, 5), 66, 2, (3, 1), (1, 1), (1, 0), (1, 1)),
    ((1, 3, 10, 8), 6, 1, (3, 3), (2, 2), (0, 0, 1, 1), (1, 1)),
    ((1, 35, 6, 9), 35, 35, (3, 5), (2, 2), (0, 1, 1, 2), (1, 1)),
    ((1, 1, 1, 1), 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 2, 1, 1), 3, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(dtype, case):
    x, weight = operands(case, dtype)
    bias = torch.randn(case[1])
    plain = ref.conv2d(x, weight, bias, **window(case))
    residual = torch.randn(plain.shape).to(dtype)
    rest = {"activation": "relu6", "residual": residual, "post_activation": "relu"}
    out = conv2d(x, weight, bias, **window(case))
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, plain)
    assert_close(
        conv2d(x, weight, bias, **window(case), **rest), ref.conv2d(x, weight, bias, **window(case), **rest)
    )


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation):
    for case in (CASES[2], CASES[7]):
        x, weight = operands(case, torch.float32)
        out = conv2d(x, weight, None, **window(case), activation=activation)
        assert_close(out, ref.conv2d(x, weight, None, **window(case), activation=activation), 8e-6)


def test_any_layout_and_empty():
    x, weight = operands(CASES[3], torch.float32)
    expected = ref.conv2d(x, weight, None, **window(CASES[3]))
    wide = torch.randn(1, 40, 14, 12)
    wide[:, :, ::2, ::2] = x
    last = weight.contiguous(memory_format=torch.channels_last)
    for view in (x.contiguous(), wide[:, :, ::2, ::2]):
        assert_close(conv2d(view, last, None, **window(CASES[3])), expected)
    one = x[:, :1, :1].expand(3, 40, 7, 6)
    assert_close(conv2d(one, weight), ref.conv2d(one, weight))
    assert conv2d(x[:0], weight).shape == (0, 37, 5, 5)
    assert conv2d(x, weight[:0]).shape == (1, 0, 5, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(1, 4, 5)}, "x must be float32"),
        ({"weight": torch.ones(6, 3, 3, 3)}, "weight must be float32 \\[O, C / groups"),
        ({"weight": torch.ones(6, 4, 9, 3)}, "weight must fit the padded image"),
        ({"bias": torch.ones(5)}, "bias must be"),
        ({"residual": torch.ones(1, 6, 5, 5)}, "residual must be"),
        ({"groups": 3}, "groups must divide"),
        ({"stride": (0, 1)}, "stride must be 2 numbers"),
        ({"padding": (1,)}, "padding must be 2 or 4 numbers"),
        ({"activation": "tanh"}, "activation must be none"),
    ],
)
def test_refuses(change, message):
    given = {"x": torch.ones(1, 4, 5, 5), "weight": torch.ones(6, 4, 3, 3)}
    with pytest.raises(RuntimeError, match=f"^conv2d: {message}"):
        conv2d(**given | change)
