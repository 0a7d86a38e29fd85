"""AWQ: four bits, packed along the outputs in an interleaved order (gemm), or along the inputs (gemv).

``w[n, k] = (q[k, n] - z[k // group_size, n]) * scales[k // group_size, n]``

=======  ========  ===============  =======================================================
gemm     qweight   int32 [K, N/8]   nibble i of word c is column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
gemm     qzeros    int32 [G, N/8]   in the same order
gemm     scales    float [G, N]
gemv     qweight   int32 [N, K/8]   nibbles in order
gemv     qzeros    int32 [N, >=G/8] nibbles in order, padded
gemv     scales    float [N, >=G]   padded
=======  ========  ===============  =======================================================

Layout: AutoAWQ (modules/linear/gemm.py, gemv.py, utils/packing_utils.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight

from .checkpoint import Checkpoint, Settings
from .codes import FLOATS, check, group_size, unpack, with_zeros

_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def read(tensors: Checkpoint, settings: Settings) -> tuple[dict[str, GroupedWeight], set[str]]:
    """Parameter name -> weight, and the names of the tensors that were read for them."""
    version = settings.text("version", "gemm").lower()
    if version not in ("gemm", "gemv"):
        raise UnsupportedError(f"AWQ version must be gemm or gemv, got {version!r}")
    if settings.integer("bits", 4) != 4:
        raise UnsupportedError(f"AWQ bits must be 4, got {settings.integer('bits')}")
    size = settings.integer("group_size", 128, low=-1)
    layer = _gemm if version == "gemm" else _gemv
    weights, used = {}, set()
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            packed = tensors[name]
            if packed.dim() != 2 or packed.dtype != torch.int32 or 0 in packed.shape:
                raise FormatError(f"{name} must be an int32 matrix")
            weights[f"{module}.weight"] = layer(tensors, module, packed, size)
            used |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    return weights, used


def _gemm(tensors: Checkpoint, module: str, packed: Tensor, size: int) -> GroupedWeight:
    columns, rows = packed.shape[0], packed.shape[1] * 8
    scales = tensors.need(f"{module}.scales")
    groups = scales.shape[0] if scales.dim() else 0
    check(scales, FLOATS, (groups, rows), f"{module}.scales")
    zeros = _interleaved(tensors.need(f"{module}.qzeros"), rows, f"{module}.qzeros")
    if zeros.shape[0] != groups:
        raise FormatError(f"{module}.qzeros must have {groups} rows, got {zeros.shape[0]}")
    size = group_size(columns, groups, size, module)
    codes = _interleaved(packed, rows, f"{module}.qweight")
    return with_zeros(codes.t(), scales.t(), zeros.t(), 4, size)


def _interleaved(words: Tensor, count: int, name: str) -> Tensor:
    return unpack(words, 4, count, name).unflatten(1, (-1, 8))[..., _PLACES].flatten(1)


def _gemv(tensors: Checkpoint, module: str, packed: Tensor, size: int) -> GroupedWeight:
    rows, columns = packed.shape[0], packed.shape[1] * 8
    size = columns if size == -1 else size
    groups = -(-columns // size) if size > 0 else 0
    scales, zeros = tensors.need(f"{module}.scales"), tensors.need(f"{module}.qzeros")
    if scales.dim() != 2 or scales.shape[1] < groups or zeros.dim() != 2 or not groups:
        raise FormatError(f"{module}: scales and qzeros must hold {groups} groups of {size}")
    check(scales, FLOATS, (rows, scales.shape[1]), f"{module}.scales")
    zeros = unpack(zeros, 4, zeros.shape[1] * 8, f"{module}.qzeros")
    if zeros.shape[0] != rows or zeros.shape[1] < groups:
        raise FormatError(f"{module}.qzeros must hold {groups} groups of {rows} rows")
    codes = unpack(packed, 4, columns, f"{module}.qweight")
    return with_zeros(codes, scales[:, :groups], zeros[:, :groups], 4, size)
