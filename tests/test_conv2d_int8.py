import pytest
import torch

from conftest import forced, variants
from conv2d_int8_cases import CL, problem
from narrowcast.kernels.conv2d_int8 import conv2d_int8_ref as ref
from tolerances import assert_close

ops = torch.ops.narrowcast

# batch, channels, out channels, height, width, kernel, stride, padding, dilation, groups
CASES = [
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1, 1),
    (2, 16, 24, 5, 7, (1, 1), 1, 0, 1, 1),
    (1, 32, 64, 6, 6, (1, 1), 2, 0, 1, 1),
    (1, 3, 32, 13, 11, (3, 3), 2, 1, 1, 1),
    (2, 20, 80, 7, 5, (3, 3), 1, 1, 1, 1),
    (1, 7, 17, 9, 8, (5, 3), (2, 1), (2, 1), (1, 2), 1),
    (1, 130, 150, 3, 3, (1, 1), 1, 1, 1, 1),
    (1, 64, 64, 8, 8, (3, 3), 1, 1, 1, 64),
    (2, 100, 100, 9, 7, (3, 3), 2, 1, 1, 100),
    (1, 70, 70, 6, 11, (5, 5), 1, 2, 1, 70),
    (1, 33, 33, 10, 9, (5, 5), 2, 2, 1, 33),
    (1, 6, 6, 8, 8, (7, 2), 1, (3, 0), (1, 3), 6),
    (1, 8, 24, 6, 6, (3, 3), 1, 1, 1, 8),
    (1, 12, 18, 6, 6, (3, 3), 1, 1, 1, 3),
    (1, 2, 3, 4, 4, (9, 9), 1, 5, 1, 1),
    (1, 3, 20, 20, 9, (7, 7), 2, 3, 1, 1),
    (1, 5, 40, 7, 6, (3, 2), 1, (1, 0), (1, 2), 1),
    (1, 32, 32, 5, 9, (3, 3), 1, 1, 1, 32),
    (1, 145, 145, 4, 5, (5, 3), 1, (2, 1), 1, 145),
    (1, 3, 20, 10, 8, (3, 3), 2, (0, 0, 1, 1), 1, 1),
    (2, 36, 40, 5, 6, (3, 2), 1, (2, 0, 0, 3), 1, 1),
    (1, 70, 70, 12, 10, (3, 3), 2, (0, 0, 1, 1), 1, 70),
    (1, 20, 20, 8, 9, (5, 5), 2, (1, 1, 2, 2), 1, 20),
    (1, 66, 66, 5, 4, (3, 4), 1, (0, 1, 2, 9), 2, 66),
]


@pytest.mark.parametrize("variant", variants("conv2d_int8"))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bit_equal_reference(variant, dtype, case):
    shape = ref.conv2d_int8(**problem(case)).shape
    byte = torch.randint(0, 128, shape, dtype=dtype).contiguous(memory_format=CL)
    epilogues = [
        {},
        {"activation": "relu6", "out_scale": 0.03, "out_zero_point": 5},
        {"out_scale": -0.1, "out_dtype": torch.int8, "residual": byte, "residual_scale": 0.05,
         "residual_zero_point": 3, "post_activation": "relu"},
        {"out_scale": 0.02, "out_dtype": torch.int8, "out_zero_point": -20, "residual": byte,
         "residual_scale": -0.03, "activation": "relu6", "post_activation": "relu6"},
        {"out_scale": 0.05, "out_zero_point": 200, "activation": "relu", "post_activation": "relu6"},
        {"out_scale": 0.07, "out_dtype": torch.int8, "out_zero_point": 11},
        {"residual": torch.randn(shape), "activation": "hardswish", "out_dtype": torch.bfloat16},
        {"residual": torch.randn(shape).half(), "out_dtype": torch.float16, "bias": None},
    ]  # fmt: skip
    for extra in epilogues:
        arguments = problem(case, dtype) | extra
        with forced("conv2d_int8", variant):
            out = ops.conv2d_int8(**arguments)
        expected = ref.conv2d_int8(**arguments)
        assert out.is_contiguous(memory_format=CL) and out.dtype == expected.dtype
        assert torch.equal(out, expected), extra


@pytest.mark.parametrize("variant", variants("conv2d_int8"))
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_smooth_activations(variant, activation):
    for case in (CASES[1], CASES[8]):
        arguments = problem(case, activation=activation)
        with forced("conv2d_int8", variant):
            out = ops.conv2d_int8(**arguments)
        assert_close(out, ref.conv2d_int8(**arguments, dtype=torch.float64))


@pytest.mark.parametrize("variant", variants("conv2d_int8"))
@pytest.mark.parametrize("case", [CASES[4], CASES[8]], ids=str)
def test_extreme_scales(variant, case):
    for extra in (
        {"x_scale": 1e30, "w_scale": torch.full((1,), 1e5)},
        {"out_scale": 1e-30},
        {"x_scale": 1e25},
    ):
        arguments = problem(case, out_zero_point=3, activation="relu") | {"out_scale": 0.03} | extra
        with forced("conv2d_int8", variant):
            assert torch.equal(ops.conv2d_int8(**arguments), ref.conv2d_int8(**arguments))
    bias = torch.randn(case[2])
    bias[1], bias[2], bias[3] = float("nan"), float("inf"), -float("inf")
    arguments = problem(case, out_scale=0.03, out_zero_point=3, bias=bias)
    with forced("conv2d_int8", variant):
        assert torch.equal(ops.conv2d_int8(**arguments), ref.conv2d_int8(**arguments))


def test_any_layout_and_one_scale():
    arguments = problem(CASES[4])
    expected = ref.conv2d_int8(**arguments)
    x = arguments["x_q"]
    wide = torch.randint(0, 256, (2, 20, 14, 10), dtype=torch.uint8)
    wide[:, :, ::2, ::2] = x
    views = [x.contiguous(), wide[:, :, ::2, ::2], x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)]
    for view in views:
        assert torch.equal(ops.conv2d_int8(**(arguments | {"x_q": view})), expected)
    one = arguments | {"w_scale": torch.tensor([0.02]), "x_q": x[:1, :1].expand(2, 20, 7, 5)}
    assert torch.equal(ops.conv2d_int8(**one), ref.conv2d_int8(**one))


def test_empty_batch():
    arguments = problem(CASES[1])
    assert ops.conv2d_int8(**(arguments | {"x_q": arguments["x_q"][:0]})).shape == (0, 24, 5, 7)


def test_out_form():
    arguments = problem(CASES[4], out_scale=0.03)
    expected = ref.conv2d_int8(**arguments)
    out = torch.full_like(expected, 77).contiguous(memory_format=CL)
    ops.conv2d_int8.out(**arguments, out=out)
    assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="out must be a channels-last"):
        ops.conv2d_int8.out(**arguments, out=out.contiguous())


def test_opcheck_and_compile():
    arguments = problem(CASES[4], out_scale=0.03)
    torch.library.opcheck(ops.conv2d_int8.default, (), arguments)
    f = torch.compile(lambda: ops.conv2d_int8(**arguments) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(), ref.conv2d_int8(**arguments) + 1)


def test_same_bits_whatever_the_threads():
    arguments = problem((3, 96, 100, 9, 9, (3, 3), 1, 1, 1, 1))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.conv2d_int8(**arguments))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_q": torch.ones(2, 20, 7, 5)}, "x_q must be uint8 or int8"),
        ({"x_q": torch.ones(20, 7, 5, dtype=torch.uint8)}, r"x_q must be \[N, C, H, W\]"),
        ({"w_q": torch.ones(80, 20, 3, 3)}, "w_q must be int8"),
        ({"w_q": torch.ones(80, 19, 3, 3, dtype=torch.int8)}, r"w_q must be \[O, 20"),
        ({"w_scale": torch.ones(3)}, "w_scale must be float32"),
        ({"bias": torch.ones(3)}, "bias must be float32"),
        ({"stride": (0, 1)}, "stride must be"),
        ({"padding": (-1, 0)}, "padding must be"),
        ({"groups": 3}, "groups must divide"),
        ({"x_zero_point": 256}, "x_zero_point must be a value of"),
        ({"x_scale": float("nan")}, "x_scale must be finite"),
        ({"out_dtype": torch.int8}, "out_scale must be given"),
        ({"out_dtype": torch.float32, "out_scale": 1.0}, "out_scale must be left out"),
        ({"activation": "swish"}, "activation must be none"),
        ({"residual": torch.ones(1, 80, 7, 5)}, "residual must have the shape of the output"),
        (
            {"x_q": torch.ones(2, 20, 1, 1, dtype=torch.uint8), "padding": (0, 0)},
            "w_q must fit the padded image",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(RuntimeError, match=f"conv2d_int8: {message}"):
        ops.conv2d_int8(**(problem(CASES[4]) | change))
