import pytest
import torch

from conv2d_int8_cases import CL, problem
from narrowcast.kernels.conv2d_int8 import conv2d_int8_ref as ref
from narrowcast.kernels.conv2d_int8.conv2d_int8_triton import conv2d_int8
from tolerances import assert_close

CASES = [  # batch, channels, out channels, height, width, kernel, stride, padding, dilation, groups
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1, 1),
    (2, 48, 24, 5, 7, (1, 1), 1, 0, 1, 1),
    (1, 32, 64, 6, 6, (1, 1), 2, 0, 1, 1),
    (1, 3, 32, 13, 11, (3, 3), 2, 1, 1, 1),
    (2, 40, 40, 5, 5, (3, 3), 1, 1, 1, 1),
    (1, 7, 17, 9, 8, (5, 3), (2, 1), (2, 1), (1, 2), 1),
    (1, 130, 70, 3, 3, (1, 1), 1, 1, 1, 1),
    (2, 100, 100, 5, 7, (3, 3), 2, 1, 1, 100),
    (1, 6, 6, 8, 8, (7, 2), 1, (3, 0), (1, 3), 6),
    (1, 8, 24, 6, 6, (3, 3), 1, 1, 1, 8),
    (1, 12, 18, 6, 6, (3, 3), 1, 1, 1, 3),
    (1, 66, 40, 4, 4, (2, 3), 1, 1, 1, 2),
    (1, 2, 3, 4, 4, (9, 9), 1, 5, 1, 1),
    (1, 33, 20, 6, 5, (3, 3), 2, (0, 0, 1, 1), 1, 1),
    (2, 20, 20, 6, 5, (1, 1), 1, (0, 0, 2, 1), 1, 20),
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bit_equal_reference(dtype, case):
    shape = ref.conv2d_int8(**problem(case)).shape
    byte = torch.randint(0, 128, shape, dtype=dtype).contiguous(memory_format=CL)
    epilogues = [
        {},
        {"x_zero_point": 128 if dtype == torch.uint8 else 0, "activation": "relu6", "out_scale": 0.03},
        {"out_scale": -0.1, "out_dtype": torch.int8, "residual": byte, "residual_scale": 0.05,
         "residual_zero_point": 3, "post_activation": "relu"},
        {"out_scale": 0.02, "out_dtype": torch.int8, "out_zero_point": -20, "residual": byte,
         "residual_scale": -0.03, "activation": "relu6", "post_activation": "relu6"},
        {"residual": torch.randn(shape).half(), "activation": "hardswish", "out_dtype": torch.float16, "bias": None},
    ]  # fmt: skip
    place = CASES.index(case)
    for extra in (epilogues[place % 5], epilogues[(place + 1 + dtype.is_signed) % 5]):
        arguments = problem(case, dtype) | extra
        out, expected = conv2d_int8(**arguments), ref.conv2d_int8(**arguments)
        assert out.is_contiguous(memory_format=CL) and out.dtype == expected.dtype
        assert torch.equal(out, expected), extra


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_smooth_activations(activation):
    for case in (CASES[1], CASES[8]):
        arguments = problem(case, activation=activation)
        assert_close(conv2d_int8(**arguments), ref.conv2d_int8(**arguments, dtype=torch.float64), 8e-6)


@pytest.mark.parametrize("case", [CASES[4], CASES[8]], ids=str)
def test_extreme_scales_and_values(case):
    bias = torch.randn(case[2])
    bias[1], bias[2], bias[3] = float("nan"), float("inf"), -float("inf")
    for extra in (
        {"x_scale": 1e30, "w_scale": torch.full((1,), 1e5)}, {"out_scale": 1e-30}, {"x_scale": 1e25}, {"bias": bias},
    ):  # fmt: skip
        arguments = problem(case, out_zero_point=3, activation="relu") | {"out_scale": 0.03} | extra
        assert torch.equal(conv2d_int8(**arguments), ref.conv2d_int8(**arguments))


def test_any_layout_and_empty():
    arguments = problem(CASES[4])
    expected, x = ref.conv2d_int8(**arguments), arguments["x_q"]
    wide = torch.randint(0, 256, (2, 40, 10, 10), dtype=torch.uint8)
    wide[:, :, ::2, ::2] = x
    last = arguments["w_q"].contiguous(memory_format=CL)
    for view in (x.contiguous(), wide[:, :, ::2, ::2]):
        assert torch.equal(conv2d_int8(**(arguments | {"x_q": view, "w_q": last})), expected)
    one = arguments | {"w_scale": torch.tensor([0.02]), "x_q": x[:1, :1].expand(2, 40, 5, 5)}
    assert torch.equal(conv2d_int8(**one), ref.conv2d_int8(**one))
    assert conv2d_int8(**(arguments | {"x_q": x[:0]})).shape == (0, 40, 5, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_q": torch.ones(1, 4, 5, 5)}, "x_q must be uint8 or int8"),
        ({"w_q": torch.ones(6, 3, 3, 3).to(torch.int8)}, "w_q must be \\[O, 4"),
        ({"w_q": torch.ones(6, 4, 9, 3).to(torch.int8)}, "w_q must fit the padded image"),
        ({"w_scale": torch.ones(5)}, "w_scale must be"),
        ({"bias": torch.ones(6).half()}, "bias must be"),
        ({"residual": torch.ones(1, 6, 5, 5)}, "residual must have the shape"),
        ({"groups": 3}, "groups must divide"),
        ({"x_zero_point": 256}, "x_zero_point must be a value"),
        ({"x_scale": 0.0}, "x_scale must be finite"),
        ({"out_dtype": torch.int8}, "out_scale must be given"),
        ({"out_scale": 0.1, "out_dtype": torch.float16}, "out_scale must be left out"),
        ({"out_scale": 0.1, "out_zero_point": -1}, "out_zero_point must be a value"),
        ({"out_dtype": torch.int32}, "out_dtype must be"),
        ({"stride": (0, 1)}, "stride must be 2 numbers"),
        ({"activation": "tanh"}, "activation must be none"),
    ],
)
def test_refuses(change, message):
    given = {
        "x_q": torch.ones(1, 4, 5, 5, dtype=torch.uint8), "x_scale": 0.1, "x_zero_point": 0,
        "w_q": torch.ones(6, 4, 3, 3, dtype=torch.int8), "w_scale": torch.ones(6),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=f"^conv2d_int8: {message}"):
        conv2d_int8(**given | change)
