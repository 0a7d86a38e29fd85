"""The weights of a Hugging Face folder whose config.json has a quantization_config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import Error, FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight, Int8Weight

from . import awq, bitsandbytes, compressed_tensors, doubts, gptq, hqq, torchao
from .checkpoint import Checkpoint, Settings, read_json

#: quant_method -> reader.
METHODS = {
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "bitsandbytes": bitsandbytes.read,
    "hqq": hqq.read,
    "torchao": torchao.read,
}


@dataclass
class Weights:
    """What a folder holds: values for every parameter, and the forms of those that were quantised.

    values: parameter name -> float tensor of the asked type. native: parameter name -> its quantised form;
    weights that no kernel's form holds exactly are only in values. quantised: the names of both. warnings: signs
    that the file does not mean what its settings say.
    """

    values: dict[str, Tensor]
    native: dict[str, GroupedWeight | Int8Weight]
    quantised: set[str]
    warnings: list[str]


def settings_of(path: Path, config: Any) -> dict[str, Any] | None:
    """What a folder says of its quantisation, in config.json or in a file of its own."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    found = found or read_json(path / "quantize_config.json") or read_json(path / "quant_config.json")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise FormatError("quantization_config must be an object")
    # Files from before quant_method are those of GPTQ.
    return {"quant_method": "gptq", **found}


def read_folder(path: Path, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Weights:
    """Reads every tensor of a folder.

    settings: the quantization_config. dtype: of the values.

    Raises FormatError for damaged files, UnsupportedError for a method or an option that is not known here.
    """
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise UnsupportedError(f"the quant_method must be one of {', '.join(METHODS)}, got {method!r}")
    tensors = Checkpoint.of_folder(path)
    try:
        found, used = METHODS[method](tensors, Settings(settings, "quantization_config"))
        values = {name: _value(tensors[name], dtype) for name in tensors if name not in used}
        for name, weight in found.items():
            if name in values:
                raise FormatError(f"the tensor {name!r} is there both quantised and in float")
            values[name] = weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)
    except Error:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, OverflowError) as error:
        text = str(error).partition("\n")[0]
        raise FormatError(f"the folder {path.name!r} is no {method} checkpoint: {text}") from error
    native = {name: w for name, w in found.items() if not isinstance(w, Tensor)}
    return Weights(values, native, set(found), doubts.zero_points(found))


def _value(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of its own, in the asked type where it is a float."""
    return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
