import itertools
import math

import pytest
import torch

from conftest import forced, variants
from linear_grouped_cases import weight
from narrowcast import ArgumentError
from narrowcast.formats import GroupedWeight
from narrowcast.kernels.dequantize.dequantize_ref import dequantize_groups
from narrowcast.kernels.linear_grouped import linear_grouped_ref as ref
from narrowcast.nn_grouped import LinearGrouped
from steps import run_step
from tolerances import BOUND, assert_close

ops = torch.ops.narrowcast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = list(ref.ACTIVATIONS)


def check(x, w, **options):
    out_dtype = options.pop("out_dtype", None) or x.dtype
    with torch.no_grad():
        out = ops.linear_grouped(x, *w, out_dtype=out_dtype, **options)
    assert out.dtype == out_dtype
    held = ref.round_rows(x) if options.get("activation_bits", 16) == 16 else x
    expected = ref.linear_grouped(held, *w, **options)
    bound = None
    if expected.numel() < 16:  # few results may all cancel: measure against what was summed
        size = x.double().abs().sum(-1).max() * dequantize_groups(*w).double().abs().max()
        bound = max(BOUND[out_dtype], 2**-22 * (size / expected.norm().clamp(min=1e-30)).item())
    assert_close(out, expected, bound, f"{tuple(x.shape)} {w[3:]} {options}")


@pytest.mark.parametrize("variant", variants("linear_grouped"))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation_bits", [8, 16, 32])
@pytest.mark.parametrize(
    "m, n, k, group",
    [
        (1, 1, 32, 32),
        (1, 960, 576, 32),
        (3, 17, 96, 32),
        (8, 5, 192, 96),
        (12, 33, 256, 64),
        (13, 16, 256, 128),
        (29, 300, 512, 256),
        (7, 31, 576, 576),
        (24, 64, 64, 32),
        (31, 65, 160, 160),
        (61, 147, 288, 96),
        (100, 3, 256, 128),
    ],
)
def test_matches_reference(variant, bits, activation_bits, m, n, k, group):
    with forced("linear_grouped", variant):
        for with_offset, scale_dtype in itertools.product((False, True), DTYPES[:2]):
            w = weight(n, k, group, bits, with_offset, scale_dtype)
            check(torch.randn(m, k), w, activation_bits=activation_bits)


@pytest.mark.parametrize("variant", variants("linear_grouped"))
@pytest.mark.parametrize("activation_bits", [8, 16, 32])
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
def test_dtypes(variant, activation_bits, x_dtype, out_dtype):
    x = torch.randn(2, 5, 128).to(x_dtype)
    for bits, other in itertools.product((4, 8), DTYPES):
        w = weight(37, 128, 32, bits, scale_dtype=torch.float16)
        bias, residual = torch.randn(37).to(other), torch.randn(2, 5, 37).to(other)
        with forced("linear_grouped", variant):
            check(
                x, w, bias=bias, activation="relu", residual=residual, out_dtype=out_dtype,
                activation_bits=activation_bits,
            )  # fmt: skip


@pytest.mark.parametrize("variant", variants("linear_grouped"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(variant, activation):
    w = weight(530, 64, 32, 4)
    bias, residual = torch.randn(530), torch.randn(14, 530)
    with forced("linear_grouped", variant):
        for post, b, r in itertools.product(("none", "relu6", "silu"), (bias, None), (residual, None)):
            check(
                torch.randn(14, 64),
                w,
                bias=b,
                activation=activation,
                residual=r,
                post_activation=post,
            )


@pytest.mark.parametrize("variant", variants("linear_grouped"))
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_part_is_exact(variant, bits):
    """Activations that are codes times a power of two, and unit scales: nothing rounds."""
    packed = torch.randint(0, 256, (19, 128 * bits // 8), dtype=torch.uint8)
    w = (packed, torch.ones(19, 4), torch.full((19, 4), 2.0), 32, bits)
    x = torch.randint(-127, 128, (5, 128)).float()
    x[:, ::32] = 127
    with forced("linear_grouped", variant):
        out = ops.linear_grouped(x * 0.25, *w, activation_bits=8)
    assert torch.equal(out.double(), ref.linear_grouped(x * 0.25, *w, activation_bits=8))


@pytest.mark.parametrize("variant", variants("linear_grouped"))
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_do_not_saturate(variant, bits):
    for code, value in itertools.product((0, 255, 128, 127), (127.0, -127.0)):
        packed = torch.full((16, 256 * bits // 8), code, dtype=torch.uint8)
        w = (packed, torch.ones(16, 2), None, 128, bits)
        with forced("linear_grouped", variant):
            check(torch.full((3, 256), value), w, activation_bits=8)


@pytest.mark.parametrize("variant", variants("linear_grouped"))
def test_special_activations(variant):
    """A NaN counts as 0 and an infinity as the largest code; zero and tiny rows stay finite."""
    w = weight(20, 64, 32, 4)
    x = torch.randn(5, 64)
    x[0, 3], x[1, 7], x[1, 40], x[2] = math.nan, math.inf, -math.inf, 0.0
    x[3] *= 1e-38
    with forced("linear_grouped", variant):
        out = ops.linear_grouped(x, *w, activation_bits=8)
        exact = ops.linear_grouped(x, *w)
    expected = ref.linear_grouped(x, *w, activation_bits=8)
    for row in range(5):
        assert_close(out[row], expected[row])
    assert exact[0].isnan().all() and exact[2].eq(0).all() and exact[3:].isfinite().all()


@pytest.mark.parametrize("activation_bits", [8, 16, 32])
def test_packed_weights_give_the_same_bits(activation_bits):
    for bits, with_offset, scale_dtype in itertools.product((4, 8), (False, True), DTYPES[:2]):
        w = weight(83, 192, 96, bits, with_offset, scale_dtype)
        panels = ops._linear_grouped_pack(*w)
        for m in (1, 12, 30):
            x, bias = torch.randn(m, 192), torch.randn(83)
            out = ops._linear_grouped_packed(
                x, panels, 83, 96, bits, scale_dtype == torch.float16, with_offset, bias, "relu",
                activation_bits=activation_bits,
            )  # fmt: skip
            assert torch.equal(out, ops.linear_grouped(x, *w, bias, "relu", activation_bits=activation_bits))


def test_sixteen_bits_are_closer_than_float16():
    """What activation_bits=16 does to x: within its bound always, nearer than float16 without outliers."""
    for outlier in (1, 1000):
        x = torch.randn(40, 576)
        x[:, 5] *= outlier
        length = x.norm(dim=1).double()
        error = (ref.round_rows(x) - x.double()).norm(dim=1)
        assert (error <= 576**0.5 * 2**-16 * length).all()
        if outlier == 1:
            assert (error < (x.half().double() - x.double()).norm(dim=1)).all()


@pytest.mark.parametrize("variant", variants("linear_grouped"))
def test_many_rows_and_few_give_the_same_bits(variant):
    with forced("linear_grouped", variant):
        for bits, with_offset in itertools.product((4, 8), (False, True)):
            w, x = weight(70, 192, 64, bits, with_offset), torch.randn(50, 192)
            for activation_bits in (8, 16):
                many = ops.linear_grouped(x, *w, activation_bits=activation_bits)
                few = [ops.linear_grouped(part, *w, activation_bits=activation_bits) for part in x.split(7)]
                assert torch.equal(many, torch.cat(few))


def test_activations_are_quantised_as_by_the_quantize_room():
    x = torch.randn(50, 512)
    x[3, 4], x[5, 6], x[7], x[8] = math.nan, math.inf, 0.0, x[8] * 1e-38
    q, scale = ops.quantize_int8(x, 64)
    expected, expected_scale = ref.quantize_blocks(x, 64)
    assert torch.equal(q, expected.flatten(-2).to(torch.int8))
    assert torch.equal(scale, expected_scale.squeeze(-1))


def test_empty_and_strided():
    w = weight(10, 64, 32, 4)
    assert ops.linear_grouped(torch.empty(0, 64), *w).shape == (0, 10)
    assert ops.linear_grouped(torch.empty(2, 64), *weight(0, 64, 32, 4)).shape == (2, 0)
    empty = (torch.empty(3, 0, dtype=torch.uint8), torch.empty(3, 0), None, 32, 4)
    bias = torch.randn(3)
    assert torch.equal(ops.linear_grouped(torch.empty(2, 0), *empty, bias), bias.expand(2, 3))
    packed, scale, offset, group, bits = weight(20, 64, 32, 4)
    x = torch.randn(64, 6).t()
    check(x[::2], (packed[::2], scale[::2], offset[::2], group, bits))
    check(torch.randn(1, 64).expand(4, 64), (packed, scale[:1].expand(20, 2), None, group, bits))
    check(torch.randn(64), w)
    check(torch.randn(6, 64), w, bias=torch.randn(1).expand(10), residual=torch.randn(10, 6).t())
    flat = torch.randint(0, 256, (10 * 32 + 1,), dtype=torch.uint8)[1:]
    check(torch.randn(385)[1:].view(6, 64), (flat.view(10, 32), *w[1:]))


def test_out_form():
    w = weight(40, 64, 32, 4)
    x, residual = torch.randn(3, 64), torch.randn(3, 40)
    for dtype in DTYPES:
        out = torch.full((3, 40), math.nan, dtype=dtype)
        assert ops.linear_grouped.out(x, *w, None, "silu", residual, out=out) is None
        assert torch.equal(out, ops.linear_grouped(x, *w, None, "silu", residual, out_dtype=dtype))
    for bad, message in (
        (torch.empty(3, 41), r"out must be \[3, 40\], got \[3, 41\]"),
        (torch.empty(3, 40, dtype=torch.int8), "out must be .* got int8"),
        (torch.empty(40, 3).t(), "out must be contiguous"),
        (residual, "out must not share memory with residual"),
    ):
        with pytest.raises(RuntimeError, match=f"linear_grouped: {message}"):
            ops.linear_grouped.out(x, *w, None, "silu", residual, out=bad)


@pytest.mark.parametrize("activation_bits", [8, 16, 32])
def test_threads_do_not_change_the_result(activation_bits):
    threads = torch.get_num_threads()
    for m, n in ((1, 700), (100, 20), (37, 500)):
        w, x = weight(n, 256, 64, 4), torch.randn(m, 256)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.linear_grouped(x, *w, activation_bits=activation_bits))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck_and_compile():
    w, x = weight(24, 64, 32, 4), torch.randn(2, 3, 64)
    bias, residual = torch.randn(24), torch.randn(2, 3, 24)
    torch.library.opcheck(ops.linear_grouped.default, (x, *w, bias, "gelu", residual, torch.float16))
    torch.library.opcheck(ops.linear_grouped.out, (x, *w), {"out": torch.empty(2, 3, 24)})
    torch.library.opcheck(ops._linear_grouped_pack.default, w)
    panels = ops._linear_grouped_pack(*w)
    torch.library.opcheck(ops._linear_grouped_packed.default, (x, panels, 24, 32, 4, False, True, bias))
    compiled = torch.compile(
        lambda x, *w: ops.linear_grouped(x, *w, activation_bits=8) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x, *w), ops.linear_grouped(x, *w, activation_bits=8) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"group_size": 16}, "group_size must be a multiple of 32 that divides K = 64, got 16"),
        ({"group_size": 128}, "group_size must be a multiple of 32"),
        ({"group_size": -32}, "group_size must be a multiple of 32"),
        ({"x": torch.ones(3, 63)}, r"x must be .* with K = 64, got float32 \[3, 63\]"),
        ({"x": torch.ones(3, 64).int()}, "x must be float32, float16 or bfloat16"),
        ({"x": torch.tensor(1.0)}, "x must be"),
        ({"packed": torch.ones(6, 32)}, "packed must be uint8"),
        ({"packed": torch.ones(32, dtype=torch.uint8)}, "packed must be uint8"),
        ({"scale": torch.ones(6, 1)}, r"scale must be \[N, K / group_size\]"),
        ({"scale": torch.ones(6, 2).bfloat16()}, "scale must be float32 or float16"),
        ({"offset": torch.ones(6, 2).half()}, "offset must have the shape and dtype"),
        ({"bias": torch.ones(5)}, r"bias must be .* \[6\], got float32 \[5\]"),
        ({"bias": torch.ones(6).int()}, "bias must be float32"),
        ({"residual": torch.ones(6)}, "residual must be"),
        ({"residual": torch.ones(3, 6).double()}, "residual must be"),
        ({"activation": "tanh"}, "activation must be none, relu, .* got 'tanh'"),
        ({"post_activation": "x"}, "post_activation must be none"),
        ({"activation_bits": 4}, "activation_bits must be 8, 16 or 32, got 4"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
    ],
)
def test_bad_input(change, message):
    packed, scale, offset, group, bits = weight(6, 64, 32, 4)
    arguments = {
        "x": torch.randn(3, 64),
        "packed": packed,
        "scale": scale,
        "offset": offset,
        "group_size": group,
        "bits": bits,
    }
    with pytest.raises(RuntimeError, match=f"linear_grouped: {message}"):
        ops.linear_grouped(**(arguments | change))


def test_bad_panels():
    with pytest.raises(RuntimeError, match=r"panels must be contiguous uint8 \[\d+\], got uint8"):
        ops._linear_grouped_packed(
            torch.randn(3, 64), torch.empty(9, dtype=torch.uint8), 6, 32, 4, False, False
        )


@pytest.mark.parametrize("activation_bits", [8, 16, 32])
def test_module(activation_bits):
    packed, scale, offset, group, bits = weight(40, 64, 32, 4)
    bias, x = torch.randn(40), torch.randn(2, 3, 64)
    layer = LinearGrouped(
        GroupedWeight(bits, group, packed, scale, offset), bias, activation="silu",
        activation_bits=activation_bits,
    )  # fmt: skip
    expected = ops.linear_grouped(
        x, packed, scale, offset, group, bits, bias, "silu", activation_bits=activation_bits
    )
    assert torch.equal(layer(x), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert set(layer.state_dict()) == {"packed", "scale", "offset", "bias"}
    layer.scale.mul_(2)  # the packed order follows
    layer.offset.mul_(2)
    again = ops.linear_grouped(
        x, packed, scale, offset, group, bits, bias, "silu", activation_bits=activation_bits
    )
    assert torch.equal(layer(x), again) and not torch.equal(again, expected)


def test_module_made_in_inference_mode():
    with torch.inference_mode():
        packed, scale, offset, group, bits = weight(40, 64, 32, 4)
        layer, x = LinearGrouped(GroupedWeight(bits, group, packed, scale, offset)), torch.randn(64)
        assert torch.equal(layer(x), ops.linear_grouped(x, packed, scale, offset, group, bits))


def test_module_refuses_other_groups():
    w = GroupedWeight(8, 16, torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 2))
    with pytest.raises(ArgumentError, match="group_size must be a multiple of 32, got 16"):
        LinearGrouped(w)
    w = GroupedWeight(8, 32, torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1))
    with pytest.raises(ArgumentError, match="activation_bits must be 8, 16 or 32, got 4"):
        LinearGrouped(w, activation_bits=4)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("activation_bits", [8, 16, 32])
def test_step(constant, activation_bits):
    for bits, with_offset in itertools.product((4, 8), (False, True)):
        packed, scale, offset, group, _ = weight(40, 64, 32, bits, with_offset, torch.float16)
        x, bias, residual = torch.randn(2, 7, 64), torch.randn(40), torch.randn(2, 7, 40)
        out = torch.full((2, 7, 40), math.nan, dtype=torch.bfloat16)
        run_step(
            "linear_grouped", [x, packed, scale, offset, bias, residual], [out],
            [False, constant, constant, constant, False, False], times=2, group_size=group,
            bits=bits, activation="gelu", activation_bits=activation_bits, post_activation="relu",
        )  # fmt: skip
        expected = ops.linear_grouped(
            x, packed, scale, offset, group, bits, bias, "gelu", residual, torch.bfloat16,
            activation_bits=activation_bits, post_activation="relu",
        )  # fmt: skip
        assert torch.equal(out, expected)


def test_step_checks_its_operands():
    packed, scale, offset, group, bits = weight(40, 64, 32, 4)
    x = torch.randn(3, 64)
    for inputs, out, message in (
        ([x, packed, scale[1:], offset, None, None], torch.empty(3, 40), "scale must be"),
        ([x, packed, scale, offset, None, None], torch.empty(3, 41), r"out must be \[3, 40\]"),
        ([x, packed[::2], scale[::2], None, None, None], torch.empty(3, 20), "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_step("linear_grouped", inputs, [out], group_size=group, bits=bits)
