"""Weights in the layout of compressed-tensors: "pack-quantized", "int-quantized", or both in one folder.

The inverse of ``importers/quantized/compressed_tensors.py``, where the layout is described.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.files import atomic_path
from narrowcast.formats import GroupedWeight, Int8Weight

Weight = Tensor | GroupedWeight | Int8Weight


def write_compressed_tensors(
    folder: str | Path, weights: Mapping[str, Weight], config: Mapping[str, Any] | None = None
) -> None:
    """Writes model.safetensors and config.json with its quantization_config.

    weights: parameter name -> a float tensor, an :class:`Int8Weight` (8-bit rows, inputs to int8 per token) or a
        :class:`GroupedWeight` (4 or 8 bits, float inputs) whose offset, if it has one, is an integer zero point
        times the scale. Quantised names must end in ".weight".
    config: the other entries of config.json.

    Raises ArgumentError for a name, UnsupportedError for a weight that the layout cannot hold exactly.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            tensors[name] = weight.detach().contiguous()
            continue
        module = name.removesuffix(".weight")
        if module == name:
            raise ArgumentError(f"weights must name quantised parameters ...weight, got {name!r}")
        if isinstance(weight, Int8Weight):
            tensors |= {name: weight.q.contiguous(), f"{module}.weight_scale": weight.scale[:, None].clone()}
            scheme = _scheme("int-quantized", 8, -1, True, inputs=True)
        else:
            parts, symmetric = _packed(name, weight)
            tensors |= {f"{module}.{part}": t for part, t in parts.items()}
            scheme = _scheme("pack-quantized", weight.bits, weight.group_size, symmetric, inputs=False)
        key = json.dumps(scheme, sort_keys=True)
        groups.setdefault(key, scheme)["targets"].append(module)
    floats = [n.removesuffix(".weight") for n, w in weights.items() if isinstance(w, Tensor) and w.dim() == 2]
    formats = {scheme["format"] for scheme in groups.values()}
    settings = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": scheme for i, scheme in enumerate(groups.values())},
        "ignore": floats,
        "kv_cache_scheme": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "model.safetensors") as path:
        safetensors.torch.save_file(tensors, str(path), metadata={"format": "pt"})
    with atomic_path(folder / "config.json") as path:
        path.write_text(json.dumps({**(config or {}), "quantization_config": settings}, indent=2))


def _scheme(kind: str, bits: int, group_size: int, symmetric: bool, inputs: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if group_size < 0 else {"strategy": "group", "group_size": group_size}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "targets": [],
        "format": kind,
        "weights": weights,
        "input_activations": activations if inputs else None,
        "output_activations": None,
    }


def _packed(name: str, weight: GroupedWeight) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a weight, and whether it has no zero points."""
    rows, columns = weight.shape
    middle = 1 << (weight.bits - 1)
    codes = weight.codes().to(torch.int32) + (middle if weight.bits == 8 else 0)
    scale = weight.scale
    parts = {"weight_packed": _words(codes, weight.bits), "weight_shape": torch.tensor([rows, columns])}
    if weight.offset is not None:
        # offset = -zero * scale over the stored codes, which count from -128 for 8 bits.
        zero = -weight.offset.double() / scale.double() + (middle if weight.bits == 8 else 0)
        zero = torch.where(scale == 0, float(middle), zero).round()
        back = -(zero - (middle if weight.bits == 8 else 0)) * scale.double()
        fits = (zero >= 0) & (zero < 1 << weight.bits) & (back.to(scale.dtype) == weight.offset)
        if not bool(fits.all()):
            raise UnsupportedError(
                f"{name}: compressed-tensors holds integer zero points, this weight has offsets that are none"
            )
        # A float16 offset may be rounded; the zero point is what was meant.
        parts["weight_zero_point"] = _words(zero.to(torch.int32).t(), weight.bits).t().contiguous()
    parts["weight_scale"] = scale.contiguous()
    if weight.columns is not None:
        index = torch.empty(columns, dtype=torch.int32)
        index[weight.columns] = (torch.arange(columns) // weight.group_size).to(torch.int32)
        parts["weight_g_idx"] = index
        back = torch.argsort(index, stable=True)
        place = torch.argsort(weight.columns)
        if not torch.equal(back, weight.columns):
            raise UnsupportedError(f"{name}: the columns of a group must lie in rising order")
        parts["weight_packed"] = _words(codes[:, place], weight.bits)
    return parts, weight.offset is None


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, count] -> int32 [rows, count * bits / 32], lowest bits first."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (4 * per_byte)))
    parts = padded.unflatten(1, (-1, per_byte)) << torch.arange(per_byte, dtype=torch.int32) * bits
    return parts.sum(-1).to(torch.uint8).contiguous().view(torch.int32)
