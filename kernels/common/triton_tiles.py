"""How the Triton products cut their work: tile sizes by shape, a first choice and what to measure it against."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_util import Config, multiprocessors, next_power_of_2

#: What a block may have on sm_86, sm_89 and sm_120; sm_80, sm_90 and sm_100 have more.
SMALL_SHARED = 99 << 10

#: Rows, columns and warps of a tile for many rows, largest first. What a kernel holds in registers sets the size:
#: one accumulator; two, or operands made in registers; operands gathered element by element, or float32.
LARGE = ((128, 128, 8), (128, 64, 8), (64, 64, 4))
MEDIUM = ((128, 64, 8), (64, 64, 8))
SMALL = ((64, 64, 4), (64, 32, 4))


def shared_memory(on: Tensor) -> int:
    if not on.is_cuda:
        return SMALL_SHARED
    return torch.cuda.get_device_properties(on.device).shared_memory_per_block_optin


def gemm_config(
    block_m: int, block_n: int, block_k: int, warps: int, bytes_m: float, bytes_n: float,
    shared: int = SMALL_SHARED, bytes_out: int = 0,
) -> Config:  # fmt: skip
    """As many stages, from 2 to 5, as shared memory holds; bytes of an element of either operand and of the result.

    Where wgmma or tcgen05 multiply, the result goes through shared memory beside the stages of the next tile.
    """
    stage = block_k * (block_m * bytes_m + block_n * bytes_n)
    result = block_m * block_n * bytes_out if shared > SMALL_SHARED else 0
    # One kilobyte stays for what is neither.
    stages = max(2, min(5, int((shared - 1024 - result) // stage)))
    return Config.of(
        warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=8 if block_m >= 64 else 1
    )


def tile_shapes(m: int, sizes: tuple) -> tuple[tuple[int, int, int], ...]:
    """Rows, columns and warps, largest first, for a result of m rows."""
    rows = max(16, next_power_of_2(m))
    if rows <= 64:
        columns = (128, 64, 32) if sizes is LARGE else (64, 32)
        return tuple((rows, c, 8 if sizes is MEDIUM and rows == c == 64 else 4) for c in columns)
    return sizes


def gemm_configs(
    m: int, n: int, k: int, bytes_m: float, bytes_n: float, bytes_out: int, on: Tensor, *,
    depth: int = 0, sizes: tuple = LARGE,
) -> list[Config]:  # fmt: skip
    """For [m, k] x [n, k]: the largest tiles that still give every multiprocessor one, then the others.

    The depth of a tile, unless given, is 128 bytes, or 256 where few rows leave room for it.
    """
    wide = max(bytes_m, bytes_n)
    depth = depth or min(next_power_of_2(max(k, 32)), int((256 if m <= 32 else 128) / wide))
    if not on.is_cuda:  # the interpreter: more than one tile and step of small problems
        return [gemm_config(32, 32, depth, 4, bytes_m, bytes_n)]
    shared = shared_memory(on)
    shapes = tile_shapes(m, SMALL if sizes is LARGE and wide >= 4 else sizes)
    tiles = [-(-m // rows) * -(-n // columns) for rows, columns, _ in shapes]
    first = next((i for i, count in enumerate(tiles) if count >= multiprocessors(on)), len(shapes) - 1)
    order = [first, *(i for i in range(len(shapes)) if i != first)]
    return [
        gemm_config(*shapes[i][:2], depth, shapes[i][2], bytes_m, bytes_n, shared, bytes_out) for i in order
    ]


def shape_class(*sizes: int) -> tuple[int, ...]:
    """The sizes rounded up to powers of two: what tuning tells apart."""
    return tuple(next_power_of_2(size) for size in sizes)


def float32_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 as float32, or by three TF32 products where the user allowed less."""
    reduced = torch.get_float32_matmul_precision() != "highest"
    return "tf32x3" if dtype == torch.float32 and reduced else "ieee"
