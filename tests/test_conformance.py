"""What a GPU is held against: the emulator's words for every instruction, beside a computation that shares no code."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu import conformance as c

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def words(request):
    given = c.inputs(request.config.option.seed)
    return given, c.run(c.build.build_source(c.SOURCE), given)


def per_lane(given: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Consecutive parts of the words of each block."""
    return np.split(given, np.cumsum(sizes)[:-1], axis=1)


# The truths: words in, words out.


def shuffle_xor(given):
    lanes = np.arange(32)
    return np.concatenate([given[:, lanes ^ mask] for mask in (1, 2, 4, 8, 16, 21)], axis=1)


def shuffle(given):
    value, lane = per_lane(given, 32, 32)
    return np.take_along_axis(value, (lane & 31).astype(np.int64), axis=1)


def global_moves(given):
    rows = given.reshape(c.BLOCKS, 32, 4)
    return np.concatenate([rows[:, ::-1].reshape(c.BLOCKS, -1), rows[:, :, [3, 0]].reshape(c.BLOCKS, -1)], 1)


def shared_moves(given):
    rows = given.reshape(c.BLOCKS, 32, 4)
    return rows[:, (np.arange(32) * 7 + 3) % 32].reshape(c.BLOCKS, -1)


def cp_async(given):
    first, second, size = per_lane(given, 128, 128, 32)
    kept = second.copy().view(np.uint8).reshape(c.BLOCKS, 32, 16)
    kept[np.arange(16) >= (size % 17)[..., None]] = 0
    rows = [first.reshape(c.BLOCKS, 32, 4), kept.view(np.uint32).reshape(c.BLOCKS, 32, 4)]
    return np.concatenate([r[:, ::-1].reshape(c.BLOCKS, -1) for r in rows], axis=1)


def ldmatrix(given, transposed):
    data, row = per_lane(given, 128, 32)
    rows = data.reshape(c.BLOCKS, 32, 4)
    asked = np.take_along_axis(rows, (row & 31).astype(np.int64)[..., None], axis=1)
    matrices = np.ascontiguousarray(asked).view(np.uint16).reshape(c.BLOCKS, 4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    # lane l holds of matrix i the word l % 4 of row l // 4, as its register i
    registers = np.ascontiguousarray(matrices).view(np.uint32).reshape(c.BLOCKS, 4, 32)
    return registers.swapaxes(1, 2).reshape(c.BLOCKS, -1)


def integer_product(given, a_type):
    def as_bytes(kind):
        return lambda w: np.ascontiguousarray(w).view(kind).reshape(*w.shape, 4).astype(np.int64)

    a, b, d = (
        c.operands(given, as_bytes(a_type))[0], *c.operands(given, as_bytes(np.int8))[1:],
    )  # fmt: skip
    product = torch.from_numpy(a) @ torch.from_numpy(b) + torch.from_numpy(d.astype(np.int64))
    return (product.numpy() & 0xFFFFFFFF).astype(np.uint32)


def dp4a(given):
    a, b, d = per_lane(given, 32, 32, 32)
    bytes_of = lambda w: np.ascontiguousarray(w).view(np.int8).reshape(c.BLOCKS, 32, 4).astype(np.int64)  # noqa: E731
    return ((bytes_of(a) * bytes_of(b)).sum(2) + d & 0xFFFFFFFF).astype(np.uint32)


def permute_bytes(given):
    a, b, selector = per_lane(given, 32, 32, 32)
    table = np.concatenate(
        [np.ascontiguousarray(w).view(np.uint8).reshape(c.BLOCKS, 32, 4) for w in (a, b)], 2
    )
    chosen = np.stack([selector >> 4 * i & 7 for i in range(4)], axis=2).astype(np.int64)
    return np.ascontiguousarray(np.take_along_axis(table, chosen, axis=2)).view(np.uint32)[..., 0]


def atomic_add(given):
    low, high = per_lane(given.astype(object), 32, 32)
    sums = (low + high * 2**32).reshape(c.BLOCKS, 8, 4).sum(1) + 0xCDCDCDCDCDCDCDCD
    sums %= 2**64
    return np.stack([sums % 2**32, sums // 2**32], axis=2).astype(np.uint32).reshape(c.BLOCKS, 8)


def to_halves(given, dtype):
    values = torch.from_numpy(given.view(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    packed = values[:, :32] | values[:, 32:].astype(np.uint32) << 16
    return np.concatenate([packed, packed], axis=1)


def from_halves(given, dtype):
    halves = given.view(np.int16).reshape(c.BLOCKS, 32, 2).swapaxes(1, 2).reshape(c.BLOCKS, 64)
    return torch.from_numpy(halves.copy()).view(dtype).float().numpy().view(np.uint32)


def rounded(exact: Fraction, precision: int, least: int, most: float) -> float:
    """To nearest even: a significand of `precision` bits, exponents from `least`; infinity past `most`."""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    result = round(size / unit) * unit
    return math.copysign(float(result) if result <= most else math.inf, exact)


def fma_halves(given, kind):
    """a b + c in rational numbers, or as IEEE 754 has it for what is not finite or is zero."""
    a, b, d = (c.half_values(w, kind) for w in per_lane(given, 32, 32, 32))
    shape = (11, -14, 65504.0) if kind == "f16" else (8, -126, 2.0**127 * (2 - 2.0**-7))
    with np.errstate(invalid="ignore"):
        plain = a * b + d
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(d)
    for i in np.argwhere(finite):
        i = tuple(i)
        exact = Fraction(a[i]) * Fraction(b[i]) + Fraction(d[i])
        if exact:
            plain[i] = rounded(exact, *shape)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    bits = torch.from_numpy(plain).to(dtype).view(torch.int16).numpy()
    return bits.view(np.uint32)


TRUTHS = {
    "shuffle_xor": shuffle_xor,
    "shuffle": shuffle,
    "global_moves": global_moves,
    "shared_moves": shared_moves,
    "cp_async": cp_async,
    "ldmatrix_x4": lambda given: ldmatrix(given, False),
    "ldmatrix_x4_trans": lambda given: ldmatrix(given, True),
    "dp4a": dp4a,
    "permute_bytes": permute_bytes,
    "fma_f16x2": lambda given: fma_halves(given, "f16"),
    "fma_bf16x2": lambda given: fma_halves(given, "bf16"),
    "atomic_add": atomic_add,
    "to_float16": lambda given: to_halves(given, torch.float16),
    "to_bfloat16": lambda given: to_halves(given, torch.bfloat16),
    "from_float16": lambda given: from_halves(given, torch.float16),
    "from_bfloat16": lambda given: from_halves(given, torch.bfloat16),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_emulator_agrees_with_numpy_and_torch(name, words):
    given, got = (w[name] for w in words)
    assert c.differences(name, given, TRUTHS[name](given), got) == (0, 0.0)


@pytest.mark.parametrize("name, a_type", [("mma_s8_s8", np.int8), ("mma_u8_s8", np.uint8)])
def test_integer_products_are_exact(name, a_type, words):
    given, got = (w[name] for w in words)
    assert np.array_equal(c.fragment_matrix(got), integer_product(given, a_type))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_products_are_rounded_once(kind, words):
    given, got = (w[f"mma_{kind}"] for w in words)
    a, b, d = c.operands(given, c.pairs_of(kind))
    exact = a @ b + np.ascontiguousarray(d).view(np.float32)
    error = np.abs(c.fragment_matrix(got.view(np.float32)) - exact)
    assert (error <= 2.0**-24 * np.abs(exact) + 2.0**-50 * c.magnitudes(given, kind)).all()


def test_every_instruction_has_a_case():
    header = (ROOT / "kernels/common/ptx.cuh").read_text().partition("#ifndef __CUDACC__")[2]
    names = set(re.findall(r"^NC_DEVICE (?!void name)[\w&]+ (\w+)\(", header, re.M))
    names |= set(re.findall(r"^NC_(?:MMA|FMA)_\w+\((\w+), \"", header, re.M))
    names |= set(re.findall(r"^template.*\nNC_DEVICE [\w&]+ (\w+)\(", header, re.M))
    names.discard("shared_address")  # what the others call
    assert {"mma_bf16", "cp_async_16", "shuffle", "sync_warp", "shared_memory", "fma_f16x2"} <= names
    source = c.SOURCE.read_text()
    assert not [name for name in sorted(names) if not re.search(rf"\b{name}(<\w+>)?\(", source)]


def test_the_tables_of_the_two_files_agree():
    table = re.findall(r'^    \{"(\w+)", .*, (\d+), (\d+)\},$', c.SOURCE.read_text(), re.M)
    assert [(name, int(i), int(o)) for name, i, o in table] == [
        (name, case.inputs, case.outputs) for name, case in c.CASES.items()
    ]
    assert f"kBlocks = {c.BLOCKS};" in c.SOURCE.read_text()


@pytest.mark.parametrize("name", c.CASES)
def test_one_wrong_element_is_noticed(name, words):
    given, wanted = (w[name] for w in words)
    assert c.differences(name, given, wanted, wanted) == (0, 0.0)
    got = wanted.copy()
    got[3, 5] ^= 0x00000100 if not name.startswith("mma") else 0x00010000
    if c.CASES[name].compare in ("f16", "bf16", "f32"):
        got[3, 5] = 0x12345678  # NaN may have any payload
    assert c.differences(name, given, wanted, got)[0] >= 1


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_the_bound_of_mma_allows_its_order_and_no_lost_product(kind, words):
    """Products cut off below the largest, as tensor cores add them, stay inside; one product left out does not."""
    name = f"mma_{kind}"
    given, wanted = (w[name] for w in words)
    a, b, d = c.operands(given, c.pairs_of(kind))
    d = np.ascontiguousarray(d).view(np.float32).astype(np.float64)
    terms = a[:, :, :, None] * b[:, None]  # [blocks, 16, k, 8]

    def words_of(matrix):  # [blocks, 16, 8] back to the lanes
        lanes = matrix.astype(np.float32).reshape(c.BLOCKS, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
        return np.ascontiguousarray(lanes).view(np.uint32).reshape(c.BLOCKS, 128)

    total = d
    for step in (terms[:, :, :8], terms[:, :, 8:]):
        parts = np.concatenate([step, total[:, :, None]], axis=2)
        unit = 2.0 ** (np.floor(np.log2(np.abs(parts).max(2, keepdims=True))) - 23)
        total = (np.trunc(parts / unit) * unit).sum(2)
    differ, worst = c.differences(name, given, wanted, words_of(total))
    assert differ == 0 and 0 < worst < c.MMA_BOUND
    differ, _ = c.differences(name, given, wanted, words_of(terms[:, :, 1:].sum(2) + d))
    assert differ > 0.9 * d.size
