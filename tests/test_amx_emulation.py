"""The AMX kernel's own source, compiled against the emulation of its tile instructions."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import variants
from narrowcast.kernels.linear_int8 import linear_int8_ref as ref
from tolerances import assert_close

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-std=c++20 -O1 -ffp-contract=off -fPIC -shared -mavx2 -mfma -mf16c -mavx512f -mavx512bw"
FLAGS += " -mavx512vl -mavx512dq -mavx512vnni -DNARROWCAST_EMULATE_AMX"


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    library = tmp_path_factory.mktemp("amx") / "tiles.so"
    sources = [ROOT / "tests/amx_shim.cpp", ROOT / "kernels/linear_int8/linear_int8_amx.cpp"]
    sources.append(ROOT / "kernels/common/activation.cpp")
    command = ["g++", *FLAGS.split(), "-I", ROOT / "kernels", *sources, "-o", library]
    subprocess.run([str(part) for part in command], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.panel_bytes.restype = ctypes.c_int64
    return loaded


def pointer(t: torch.Tensor | None):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def by_tiles(tiles, x_q, x_scale, w_q, w_scale, bias, zero=None, group_size=0):
    (m, k), n = x_q.shape, w_q.shape[0]
    ld = -(-k // 64) * 64
    x = torch.zeros(m, ld, dtype=torch.int8)
    x[:, :k] = x_q
    size = tiles.panel_bytes(ctypes.c_int64(k))
    memory = torch.zeros(size + 64, dtype=torch.uint8)
    panel = memory[-memory.data_ptr() % 64 :]
    y = torch.full((m, n), float("nan"))
    tiles.linear_int8_by_tiles(
        pointer(x), ctypes.c_int64(ld), pointer(w_q), pointer(x_scale), pointer(w_scale),
        pointer(zero), pointer(bias), *map(ctypes.c_int64, (m, n, k, group_size)), pointer(panel),
        pointer(y),
    )  # fmt: skip
    return y


def test_kernel_source(tiles):
    if "avx512" not in variants("linear_int8"):
        return  # compiling is all this CPU can do: packing and epilogue are AVX-512
    for m, n, k in [(1, 1, 1), (3, 17, 63), (16, 64, 64), (17, 65, 130), (32, 31, 256), (45, 100, 96)]:
        x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        w_q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        x_scale, w_scale, bias = torch.rand(m), torch.rand(n), torch.randn(n)
        for zero in (None, torch.randint(-128, 128, (m,), dtype=torch.int32)):
            y = by_tiles(tiles, x_q, x_scale, w_q, w_scale, bias, zero)
            expected = ref.linear_int8(
                x_q, x_scale, w_q, w_scale, bias, x_zero_point=zero, dtype=torch.float32
            )
            assert torch.equal(y, expected)
    for k, group_size in [(96, 32), (192, 64), (192, 96)]:
        x_q = torch.randint(-128, 128, (37, k), dtype=torch.int8)
        w_q = torch.randint(-128, 128, (70, k), dtype=torch.int8)
        x_scale, w_scale, bias = torch.rand(37, k // group_size), torch.rand(70), torch.randn(70)
        y = by_tiles(tiles, x_q, x_scale, w_q, w_scale, bias, None, group_size)
        assert_close(y, ref.linear_int8(x_q, x_scale, w_q, w_scale, bias, group_size=group_size))
    x_q, w_q = (torch.full((r, 70_001), -128, dtype=torch.int8) for r in (2, 3))
    one = torch.ones(3)
    y = by_tiles(tiles, x_q, one, w_q, one, None)
    assert_close(y, ref.linear_int8(x_q, one[:2], w_q, one))


@pytest.mark.parametrize("rows, inner, columns", [(1, 1, 1), (16, 16, 16), (5, 8, 11)])
def test_single_instructions(tiles, rows, inner, columns):
    b = torch.randint(-128, 128, (inner, columns, 4), dtype=torch.int8)
    for kind, low in ((0, -128), (1, 0)):
        dtype = torch.int8 if kind == 0 else torch.uint8
        a = torch.randint(low, low + 256, (rows, inner, 4)).to(dtype)
        c = torch.randint(-(2**30), 2**30, (rows, columns), dtype=torch.int32)
        expected = c + torch.einsum("mki,kni->mn", a.double(), b.double()).to(torch.int32)
        tiles.one_dot(kind, rows, inner, columns, pointer(a), pointer(b), pointer(c))
        assert torch.equal(c, expected)
    a, b = torch.randn(rows, inner, 2).bfloat16(), torch.randn(inner, columns, 2).bfloat16()
    c = torch.randn(rows, columns)
    expected = c.double() + torch.einsum("mki,kni->mn", a.double(), b.double())
    tiles.one_dot(2, rows, inner, columns, pointer(a), pointer(b), pointer(c))
    assert_close(c, expected)
