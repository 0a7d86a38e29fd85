"""Quantised weight layouts: conversions are exact, mistakes are named."""

import gguf
import numpy as np
import pytest
import torch

from narrowcast import ArgumentError, FormatError, UnsupportedError
from narrowcast.formats import (
    GGUF_BLOCKS,
    GGUF_GROUPED,
    GroupedWeight,
    Int8Weight,
    from_gguf,
    gguf_columns,
    pack_int4,
    unpack_int4,
)


def grouped(n=6, k=64, group=32, bits=4, with_offset=True, dtype=torch.float32):
    packed = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
    scale = torch.randn(n, k // group).to(dtype)
    offset = torch.randn(n, k // group).to(dtype) if with_offset else None
    return GroupedWeight(bits, group, packed, scale, offset)


def test_pack_int4_round_trip():
    codes = torch.randint(0, 16, (3, 5, 34), dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)
    assert pack_int4(torch.tensor([1, 15], dtype=torch.uint8)).tolist() == [1 | 15 << 4]


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q8_0"])
def test_from_gguf_is_exact(type):
    k = 96
    blocks = np.stack([
        gguf.quants.quantize(row, gguf.GGMLQuantizationType[type])
        for row in torch.randn(7, k).numpy()
    ])  # fmt: skip
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type])).reshape(7, k)
    weight = from_gguf(torch.from_numpy(blocks), type)
    assert weight.shape == (7, k)
    assert weight.scale.dtype == torch.float16
    assert (weight.offset is None) == (type != "Q4_1")
    assert weight.nbytes == blocks.nbytes
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("type", GGUF_GROUPED)
def test_every_block_type_is_exact(type):
    """Random bytes, so that every bit of every field counts; only the halves are drawn as numbers."""
    elements, size = GGUF_BLOCKS[type]
    n, k = 5, 768
    blocks = np.random.default_rng(torch.initial_seed()).integers(
        0, 256, (n, k // elements, size), dtype=np.uint8
    )
    halves = [208] if type == "Q6_K" else [0, 2] if type.endswith(("_1", "_K")) else [0]
    for at in halves:
        numbers = torch.randn(n, k // elements, 1).half().numpy()
        blocks[..., at : at + 2] = numbers.view(np.uint8)
    blocks = blocks.reshape(n, -1)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type]))
    weight = from_gguf(torch.from_numpy(blocks), type)
    assert (weight.bits, weight.group_size) == GGUF_GROUPED[type]
    assert torch.equal(weight.dequantize(), expected.reshape(n, k))
    assert from_gguf(torch.zeros(0, size, dtype=torch.uint8), type).shape == (0, elements)


def test_columns():
    columns = torch.randperm(64)
    plain = grouped()
    weight = GroupedWeight(4, 32, plain.packed, plain.scale, plain.offset, columns)
    expected = torch.empty(6, 64)
    expected[:, columns] = plain.dequantize()
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.rows(torch.tensor([3, 1])).dequantize(), expected[[3, 1]])
    assert torch.equal(GroupedWeight.concatenate([weight, weight]).dequantize(), expected.repeat(2, 1))
    assert weight.nbytes == plain.nbytes + 64 * 8 and weight.to("cpu").columns is not None
    with pytest.raises(ArgumentError, match="parts must share columns"):
        GroupedWeight.concatenate([weight, plain])
    for bad, message in ((columns.int(), "columns must be int64"), (columns * 0, "must be a permutation")):
        with pytest.raises(ArgumentError, match=message):
            GroupedWeight(4, 32, plain.packed, plain.scale, plain.offset, bad)


def test_gguf_block_sizes_agree_with_the_package():
    for name, sizes in GGUF_BLOCKS.items():
        assert sizes == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert gguf_columns(torch.zeros(2, 420, dtype=torch.uint8), "Q6_K") == 512


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_offset", [False, True])
def test_rows_and_concatenate(bits, with_offset):
    a, b = (grouped(n, bits=bits, with_offset=with_offset) for n in (3, 5))
    joined = GroupedWeight.concatenate([a, b])
    assert torch.equal(joined.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    index = torch.randperm(8)
    assert torch.equal(joined.rows(index).dequantize(), joined.dequantize()[index])
    assert torch.equal(joined.rows(slice(3, None)).dequantize(), b.dequantize())
    assert joined.codes().shape == joined.shape


@pytest.mark.parametrize("bits", [4, 8])
def test_concatenate_mixed_offsets_and_scales(bits):
    a = grouped(3, bits=bits, with_offset=False, dtype=torch.float16)
    b = grouped(2, bits=bits, with_offset=True, dtype=torch.float32)
    c = grouped(2, bits=bits, with_offset=True, dtype=torch.float16)
    for parts in ([a, b], [a, c], [b, a, c]):
        joined = GroupedWeight.concatenate(parts)
        assert torch.equal(joined.dequantize(), torch.cat([p.dequantize() for p in parts]))


def test_int8_weight():
    w = Int8Weight(torch.randint(-128, 128, (5, 9), dtype=torch.int8), torch.randn(5))
    assert w.shape == (5, 9) and w.nbytes == 45 + 20
    assert torch.equal(w.dequantize(), w.q.float() * w.scale[:, None])
    joined = Int8Weight.concatenate([w, w.rows(torch.tensor([4, 0]))])
    assert torch.equal(joined.dequantize(), w.dequantize()[[0, 1, 2, 3, 4, 4, 0]])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: grouped(bits=3), "bits must be 4 or 8, got 3"),
        (lambda: grouped(k=66, group=33), "group_size must be positive, even for 4 bits"),
        (
            lambda: GroupedWeight(4, 32, torch.zeros(2, 16), torch.ones(2, 1)),
            r"packed must be uint8 \[N, K \* bits / 8\], got float32 \[2, 16\]",
        ),
        (
            lambda: GroupedWeight(4, 32, torch.zeros(2, 16, dtype=torch.uint8), torch.ones(1, 2)),
            r"scale must be float32 or float16 \[2, 1\], got float32 \[1, 2\]",
        ),
        (
            lambda: GroupedWeight(
                4, 32, torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2)
            ),
            "offset must have the dtype and shape of scale",
        ),
        (lambda: Int8Weight(torch.zeros(2, 3), torch.ones(2)), "q must be int8"),
        (
            lambda: Int8Weight(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3)),
            r"scale must be float32 \[2\]",
        ),
        (lambda: GroupedWeight.concatenate([]), "parts must not be empty"),
        (
            lambda: GroupedWeight.concatenate([grouped(), grouped(bits=8)]),
            "parts must share bits",
        ),
        (lambda: pack_int4(torch.zeros(3, dtype=torch.uint8)), "codes must have an even"),
        (
            lambda: from_gguf(torch.zeros(18, dtype=torch.uint8), "Q4_0"),
            r"blocks must be uint8 \[N, bytes\]",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_gguf_errors():
    with pytest.raises(UnsupportedError, match="type must be one of Q4_0, Q4_1, Q5_0"):
        from_gguf(torch.zeros(1, 144, dtype=torch.uint8), "F16")
    with pytest.raises(FormatError, match="a Q4_0 row must be a multiple of 18 bytes, got 17"):
        from_gguf(torch.zeros(1, 17, dtype=torch.uint8), "Q4_0")
    with pytest.raises(UnsupportedError, match="type must be one of"):
        gguf_columns(torch.zeros(1, 17, dtype=torch.uint8), "IQ1_S")
