"""Bit for bit: dequantize_gguf against the format's own package, dequantize_int8 against torch."""

import math

import pytest
import torch

from conftest import forced, variants
from dequantize_cases import SCALES_AT, random_blocks, same_bits
from narrowcast.formats import GGUF_BLOCKS
from narrowcast.kernels.dequantize import dequantize_ref as ref
from steps import run_step

ops = torch.ops.narrowcast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("variant", variants("dequantize_gguf"))
@pytest.mark.parametrize("type", GGUF_BLOCKS)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_gguf_bit_equal_package(variant, type, out_dtype):
    for lead in ((1, 1), (3, 7), (2, 3, 9), (5,), (70, 11)):
        blocks = random_blocks(type, *lead)
        with forced("dequantize_gguf", variant):
            out = ops.dequantize_gguf(blocks, type, out_dtype)
        assert same_bits(out, ref.dequantize_gguf(blocks, type, out_dtype))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("variant", variants("dequantize_gguf"))
@pytest.mark.parametrize("type", SCALES_AT)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 0.0, 6e-8, 65504.0])
def test_gguf_special_scales(variant, type, special):
    blocks = random_blocks(type, 3, 2, special=special)
    with forced("dequantize_gguf", variant):
        out = ops.dequantize_gguf(blocks, type)
    expected = ref.dequantize_gguf(blocks, type)
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(out.isnan(), expected.isnan())


def test_gguf_plain_types_keep_every_value():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for type, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        blocks = every.view(torch.uint8)
        expected = every.view(dtype)
        out = ops.dequantize_gguf(blocks, type, dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_gguf_empty_strided_unaligned():
    assert ops.dequantize_gguf(torch.empty(0, 144, dtype=torch.uint8), "Q4_K").shape == (0, 256)
    assert ops.dequantize_gguf(torch.empty(3, 0, dtype=torch.uint8), "Q4_K").shape == (3, 0)
    for type, (_, size) in GGUF_BLOCKS.items():
        blocks = random_blocks(type, 6, 2)
        flat = torch.empty(blocks.numel() + 1, dtype=torch.uint8)
        unaligned = flat[1:].view(blocks.shape).copy_(blocks)
        expected = ref.dequantize_gguf(blocks, type)
        assert same_bits(ops.dequantize_gguf(unaligned, type), expected)
        assert same_bits(ops.dequantize_gguf(blocks[::2], type), expected[::2])
        assert same_bits(
            ops.dequantize_gguf(blocks[:, size:], type), ref.dequantize_gguf(blocks[:, size:], type)
        )
        one = blocks[:1].expand(4, -1)
        assert same_bits(ops.dequantize_gguf(one, type), ref.dequantize_gguf(one, type))


def test_gguf_opcheck_and_compile():
    blocks = random_blocks("Q6_K", 3, 2)
    torch.library.opcheck(ops.dequantize_gguf.default, (blocks, "Q6_K", torch.float16))
    compiled = torch.compile(
        lambda b: ops.dequantize_gguf(b, "Q6_K") + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(blocks), ref.dequantize_gguf(blocks, "Q6_K") + 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 36), "Q4_0"), r"blocks must be uint8 \[\.\.\., bytes\], got float32"),
        ((torch.zeros((), dtype=torch.uint8), "Q4_0"), "blocks must be uint8"),
        ((torch.zeros(2, 17, dtype=torch.uint8), "Q4_0"), "multiple of 18 bytes .* got 17"),
        ((torch.zeros(2, 36, dtype=torch.uint8), "Q3_K"), "type must be .*, got 'Q3_K'"),
        ((torch.zeros(2, 36, dtype=torch.uint8), "Q4_0", torch.int8), "out_dtype must be"),
    ],
)
def test_gguf_bad_input(arguments, message):
    with pytest.raises(RuntimeError, match=f"dequantize_gguf: .*{message}"):
        ops.dequantize_gguf(*arguments)


def int8_inputs(shape, group, dtype=torch.int8, with_zero=True):
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    q = torch.randint(low, high, shape, dtype=dtype)
    lead = (*shape[:-1], shape[-1] // group) if group else shape[:-1]
    zero = torch.randint(-300, 300, lead, dtype=torch.int32) if with_zero else None
    return q, torch.randn(lead), zero, group


@pytest.mark.parametrize("variant", variants("dequantize_int8"))
@pytest.mark.parametrize("shape, group", [
    ((7,), 0), ((1, 1), 0), ((5, 13), 0), ((3, 7, 300), 0), ((300, 64), 32), ((2, 3, 77), 11),
    ((9,), 3),
])  # fmt: skip
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_int8_bit_equal_reference(variant, shape, group, out_dtype):
    for dtype in (torch.int8, torch.uint8):
        for with_zero in (False, True):
            inputs = int8_inputs(shape, group, dtype, with_zero)
            with forced("dequantize_int8", variant):
                out = ops.dequantize_int8(*inputs, out_dtype)
            assert same_bits(out, ref.dequantize_int8(*inputs, out_dtype))


def test_int8_per_tensor_empty_strided():
    q, _, _, _ = int8_inputs((4, 6), 0)
    scale, zero = torch.tensor(0.25), torch.tensor(-3, dtype=torch.int32)
    assert torch.equal(ops.dequantize_int8(q, scale, zero), (q.int() + 3) * 0.25)
    assert ops.dequantize_int8(*int8_inputs((0, 6), 0)).shape == (0, 6)
    assert ops.dequantize_int8(*int8_inputs((3, 0), 0)).shape == (3, 0)
    q, scale, zero, group = int8_inputs((8, 64), 32)
    strided = (q[::2], scale[::2], zero[::2], group)
    assert torch.equal(ops.dequantize_int8(*strided), ref.dequantize_int8(*strided))
    wide = (q.t().contiguous().t(), scale[:1].expand(8, 2), zero[:, :1].expand(8, 2), group)
    assert torch.equal(ops.dequantize_int8(*wide), ref.dequantize_int8(*wide))


@pytest.mark.parametrize("variant", variants("dequantize_int8"))
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 16, 9, 1), (3, 257, 33, 4)])
def test_one_scale_keeps_the_layout(variant, shape):
    """Images stay in channels-last order: a copy to another would cost more than the work."""
    q = int8_inputs(shape, 0)[0].to(memory_format=torch.channels_last)
    scale, zero = torch.tensor(0.37), torch.tensor(5, dtype=torch.int32)
    with forced("dequantize_int8", variant):
        y = ops.dequantize_int8(q, scale, zero)
    assert y.stride() == q.stride() and torch.equal(y, (q.int() - 5).float() * scale)
    out = torch.full(shape, math.nan).to(memory_format=torch.channels_last)
    run_step("dequantize_int8", [q, scale, zero], [out], group_size=0)
    assert torch.equal(out, y)
    if shape[1] * shape[2] > 9 and shape[3] > 1:
        with pytest.raises(
            RuntimeError, match="dequantize_int8: q must be dense and laid out like the output"
        ):
            run_step("dequantize_int8", [q, scale, zero], [out.contiguous()], group_size=0)
    gaps = q[:, ::2]
    assert torch.equal(ops.dequantize_int8(gaps, scale, zero), y[:, ::2])
    torch.library.opcheck(ops.dequantize_int8.default, (q, scale, zero))
    torch.library.opcheck(ops.dequantize_int8.default, (gaps, scale, zero))


def test_int8_opcheck_and_compile():
    inputs = int8_inputs((6, 64), 32)
    torch.library.opcheck(ops.dequantize_int8.default, inputs)
    compiled = torch.compile(lambda *a: ops.dequantize_int8(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), ref.dequantize_int8(*inputs) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(6, 64)}, r"q must be int8 or uint8 \[\.\.\., K\], got float32"),
        ({"group_size": 7}, "group_size must be 0 .* or divide K = 64, got 7"),
        ({"group_size": -1}, "group_size must be 0"),
        ({"scale": torch.ones(6, 1)}, "scale must be float32"),
        ({"scale": torch.ones(6, 2).double()}, "scale must be float32"),
        ({"scale": torch.tensor(1.0)}, "scale must be float32"),
        ({"zero_point": torch.ones(6, 2)}, "zero_point must be int32"),
        ({"zero_point": torch.ones(2, 6, dtype=torch.int32)}, "zero_point must be int32"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
    ],
)
def test_int8_bad_input(change, message):
    arguments = dict(zip(("q", "scale", "zero_point", "group_size"), int8_inputs((6, 64), 32)))
    with pytest.raises(RuntimeError, match=f"dequantize_int8: .*{message}"):
        ops.dequantize_int8(**(arguments | change))


def test_steps():
    blocks = random_blocks("Q4_K", 3, 2)
    out = torch.full((3, 512), math.nan, dtype=torch.float16)
    run_step("dequantize_gguf", [blocks], [out], type="Q4_K")
    assert same_bits(out, ref.dequantize_gguf(blocks, "Q4_K", torch.float16))
    q, scale, zero, group = int8_inputs((5, 64), 32)
    out = torch.full((5, 64), math.nan)
    run_step("dequantize_int8", [q, scale, zero], [out], group_size=group)
    assert same_bits(out, ref.dequantize_int8(q, scale, zero, group))
    with pytest.raises(RuntimeError, match="dequantize_int8: out must have 320 elements, got 319"):
        run_step("dequantize_int8", [q, scale, zero], [out.flatten()[1:]], group_size=group)
    with pytest.raises(RuntimeError, match="dequantize_gguf: out must have 1536 elements"):
        run_step("dequantize_gguf", [blocks], [torch.empty(3, 511)], type="Q4_K")
