"""GPTQ: codes packed along the inputs, zero points along the outputs, groups that may be scattered.

``w[n, k] = (q[k, n] - z[g_idx[k], n]) * scales[g_idx[k], n]``

========  ======================  ==============================================================
qweight   int32 [K * bits/32, N]  code k of column n in bits ``bits * k`` of that column
qzeros    int32 [G, N * bits/32]  zero points; files of version 1 store ``z - 1``
scales    float [G, N]
g_idx     int32 [K]               the group of each input; may be absent
========  ======================  ==============================================================

Layout: GPTQModel (nn_modules/qlinear), checkpoint formats "gptq" and "gptq_v2".
"""

from __future__ import annotations

import torch

from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight

from .checkpoint import Checkpoint, Settings
from .codes import FLOATS, check, group_size, sorted_columns, unpack, with_zeros

BITS = (2, 3, 4, 8)


def read(tensors: Checkpoint, settings: Settings) -> tuple[dict[str, GroupedWeight], set[str]]:
    """Parameter name -> weight, and the names of the tensors that were read for them."""
    version = settings.text("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"GPTQ checkpoint_format must be gptq or gptq_v2, got {version!r}")
    if settings.text("pack_dtype", "int32") != "int32":
        raise UnsupportedError(f"GPTQ pack_dtype must be int32, got {settings.text('pack_dtype')!r}")
    bits, size = settings.integer("bits", low=1, high=32), settings.integer("group_size", -1, low=-1)
    weights, used = {}, set()
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            weights[f"{module}.weight"] = _layer(tensors, module, bits, size, version == "gptq")
            used |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    return weights, used


def _layer(tensors: Checkpoint, module: str, bits: int, size: int, one_less: bool) -> GroupedWeight:
    packed, scales = tensors.need(f"{module}.qweight"), tensors.need(f"{module}.scales")
    if packed.dim() != 2 or scales.dim() != 2 or 0 in packed.shape or 0 in scales.shape:
        raise FormatError(f"{module}.qweight and scales must be matrices")
    rows, groups = packed.shape[1], scales.shape[0]
    index = tensors.get(f"{module}.g_idx")
    if index is not None and index.numel():
        columns = index.numel()
        check(index, (torch.int32, torch.int64), (columns,), f"{module}.g_idx")
        # A file may give single layers other bits: their number follows from the sizes.
        bits = packed.shape[0] * 32 // columns
    else:
        index, columns = None, packed.shape[0] * 32 // bits
    if bits not in BITS:
        raise UnsupportedError(f"{module}: GPTQ bits must be one of 2, 3, 4, 8, got {bits}")
    check(scales, FLOATS, (groups, rows), f"{module}.scales")
    zeros = unpack(tensors.need(f"{module}.qzeros"), bits, rows, f"{module}.qzeros")
    if zeros.shape[0] != groups:
        raise FormatError(f"{module}.qzeros must have {groups} rows, got {zeros.shape[0]}")
    size = group_size(columns, groups, size, module)
    order = None if index is None else sorted_columns(index, groups, size, f"{module}.g_idx")
    codes = unpack(packed.t(), bits, columns, f"{module}.qweight")
    codes = codes if order is None else codes[:, order]
    if one_less:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return with_zeros(codes, scales.t(), zeros.t(), bits, size, order)
