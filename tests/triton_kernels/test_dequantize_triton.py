import math

import pytest
import torch

from conftest import DEVICE, STORED
from dequantize_cases import SCALES_AT, group_inputs, random_blocks, same_bits
from narrowcast.formats import GGUF_BLOCKS
from narrowcast.kernels.dequantize import dequantize_gguf_triton, dequantize_triton
from narrowcast.kernels.dequantize import dequantize_ref as ref


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n, k, group", [(1, 2, 2), (3, 32, 32), (5, 96, 6), (7, 768, 256), (2, 1200, 600)])
@pytest.mark.parametrize("out_dtype", STORED)
def test_groups_bit_equal_reference(bits, n, k, group, out_dtype):
    for scale_dtype, with_offset in ((torch.float32, False), (torch.float16, True)):
        inputs = group_inputs(n, k, group, bits, scale_dtype, with_offset)
        out = dequantize_triton.dequantize_groups(*inputs, out_dtype)
        assert torch.equal(out, ref.dequantize_groups(*inputs, out_dtype))


def test_groups_longer_than_a_tile_empty_strided():
    for bits in (4, 8):
        inputs = group_inputs(2, 2 * 5000, 5000, bits, torch.float32, True)
        assert torch.equal(dequantize_triton.dequantize_groups(*inputs), ref.dequantize_groups(*inputs))
    empty = group_inputs(0, 64, 32, 4, torch.float32, True)
    assert dequantize_triton.dequantize_groups(*empty).shape == (0, 64)
    packed, scale, offset, group, bits = group_inputs(8, 64, 32, 4, torch.float32, True)
    strided = (packed[::2], scale[::2], offset[::2], group, bits)
    assert torch.equal(dequantize_triton.dequantize_groups(*strided), ref.dequantize_groups(*strided))
    signed = packed.view(torch.int8)
    out = dequantize_triton.dequantize_groups(signed, scale, offset, group, bits)
    assert torch.equal(out, ref.dequantize_groups(packed, scale, offset, group, bits))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("out_dtype", STORED)
def test_int8_bit_equal_reference(dtype, out_dtype):
    for shape, group in (((1, 1), 0), ((3, 7), 0), ((2, 3, 64), 32), ((5, 96), 6), ((2, 5000), 0), ((9,), 0)):
        info = torch.iinfo(dtype)
        q = torch.randint(info.min, info.max + 1, shape, dtype=dtype)
        scales = (*shape[:-1], shape[-1] // group) if group else shape[:-1]
        scale, zero = torch.randn(scales), torch.randint(-200, 200, scales, dtype=torch.int32)
        for z in (None, zero):
            out = dequantize_triton.dequantize_int8(q, scale, z, group, out_dtype)
            assert torch.equal(out, ref.dequantize_int8(q, scale, z, group, out_dtype))
    one, zero = torch.tensor(0.3), torch.tensor(-7, dtype=torch.int32)
    out = dequantize_triton.dequantize_int8(q[None].expand(4, -1), one, zero, 0, out_dtype)
    assert torch.equal(out, ((q.int() + 7).float() * one).to(out_dtype).expand(4, -1))
    assert dequantize_triton.dequantize_int8(q.new_empty(3, 0), torch.ones(3)).shape == (3, 0)


def test_int8_wraps_as_int32():
    q, zero = torch.tensor([[127, -128]], dtype=torch.int8), torch.tensor([-(2**31)], dtype=torch.int32)
    out = dequantize_triton.dequantize_int8(q, torch.ones(1), zero)
    assert torch.equal(out, ref.dequantize_int8(q, torch.ones(1), zero)) and out[0, 0] < 0 < out[0, 1]


def gguf(blocks, type, out_dtype=torch.float32):
    return dequantize_gguf_triton.dequantize_gguf(blocks, type, out_dtype)


def expected_gguf(blocks, type, out_dtype=torch.float32):
    return ref.dequantize_gguf(blocks.cpu(), type, out_dtype).to(DEVICE)


@pytest.mark.parametrize("type", GGUF_BLOCKS)
@pytest.mark.parametrize("out_dtype", STORED)
def test_gguf_bit_equal_package(type, out_dtype):
    for lead in ((1, 1), (3, 7), (2, 3, 9), (5,), (70, 2)):
        blocks = random_blocks(type, *lead)
        assert same_bits(gguf(blocks, type, out_dtype), expected_gguf(blocks, type, out_dtype))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("type", SCALES_AT)
def test_gguf_special_scales(type):
    for special in (math.nan, math.inf, -math.inf, 0.0, 6e-8, 65504.0):
        blocks = random_blocks(type, 2, special=special)
        out, expected = gguf(blocks, type), expected_gguf(blocks, type)
        assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(out.isnan(), expected.isnan())


def test_gguf_empty_strided_unaligned():
    assert gguf(torch.empty(0, 144, dtype=torch.uint8), "Q4_K").shape == (0, 256)
    assert gguf(torch.empty(3, 0, dtype=torch.uint8), "Q4_K").shape == (3, 0)
    for type, (_, size) in GGUF_BLOCKS.items():
        blocks = random_blocks(type, 6, 2)
        flat = torch.empty(blocks.numel() + 1, dtype=torch.uint8)
        unaligned = flat[1:].view(blocks.shape).copy_(blocks)
        expected = expected_gguf(blocks, type)
        assert same_bits(gguf(unaligned, type), expected)
        assert same_bits(gguf(blocks[::2], type), expected[::2])
        assert same_bits(gguf(blocks[:, size:], type), expected_gguf(blocks[:, size:], type))


def test_gguf_result_is_its_own():
    blocks = torch.zeros(4, dtype=torch.uint8)
    gguf(blocks, "F32").fill_(1.0)
    assert not blocks.any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"group_size": 7}, "group_size must be positive"),
        ({"scale": torch.ones(6, 1)}, r"scale must be \[N, K / group_size\]"),
        ({"packed": torch.ones(6, 32)}, "packed must be uint8"),
        ({"offset": torch.ones(6, 2, dtype=torch.float64)}, "offset must have the shape and dtype"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
    ],
)
def test_groups_bad_input(change, message):
    packed, scale, offset, group, bits = group_inputs(6, 64, 32, 4, torch.float32, True)
    given = {"packed": packed, "scale": scale, "offset": offset, "group_size": group, "bits": bits}
    with pytest.raises(RuntimeError, match=f"dequantize_groups: {message}"):
        dequantize_triton.dequantize_groups(**(given | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(3, 64)}, "q must be int8 or uint8"),
        ({"group_size": 7}, "group_size must be 0"),
        ({"group_size": 32}, "scale must be float32 of the shape of q"),
        ({"scale": torch.ones(4)}, "scale must be float32 of the shape of q"),
        ({"scale": torch.ones(3).double()}, "scale must be float32 of the shape of q"),
        ({"zero_point": torch.ones(3)}, "zero_point must be int32"),
        ({"zero_point": torch.ones(2, dtype=torch.int32)}, "zero_point must be int32"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
    ],
)
def test_int8_bad_input(change, message):
    given = {"q": torch.ones(3, 64, dtype=torch.int8), "scale": torch.ones(3)}
    with pytest.raises(RuntimeError, match=f"dequantize_int8: {message}"):
        dequantize_triton.dequantize_int8(**(given | change))


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
        gguf(*arguments)
