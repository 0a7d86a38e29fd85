"""Any ``nn.Module`` that torch.export accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import ArgumentError, Error, UnsupportedError

from .model import Model

_KINDS = ("encoder", "image", "generic")


def load(
    module: torch.nn.Module,
    example_inputs: tuple | None = None,
    dynamic_shapes: Any = None,
    kind: str = "generic",
    config: dict[str, Any] | None = None,
) -> Model:
    """Exports a module in evaluation mode; the module keeps its own mode.

    example_inputs: positional inputs, tensors. dynamic_shapes: as ``torch.export.export`` takes them; without
    it every size is fixed. kind: "generic", or "encoder" or "image" when the module has those inputs.

    Raises ArgumentError for inputs that are no tensors, UnsupportedError when torch.export cannot trace it.
    """
    if kind not in _KINDS:
        raise ArgumentError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple | list) or not all(isinstance(x, Tensor) for x in example_inputs):
        raise ArgumentError("a torch.nn.Module needs example_inputs, a tuple of its positional tensors")
    return Model(export(module, tuple(example_inputs), dynamic_shapes), kind, dict(config or {}))


def export(
    module: torch.nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """``torch.export.export`` at inference, its errors passed on with a hint."""
    modes = {m: m.training for m in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
    except Error:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"torch.export cannot trace {type(module).__name__}: {error}\n"
            "Control flow on tensor values must become torch.cond or torch.where; a fixed size must "
            "be left out of dynamic_shapes; code that is no part of the model belongs outside forward."
        ) from error
    finally:
        for m, training in modes.items():
            m.training = training
