"""torch's own dynamic int8 quantisation of dense layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from . import Engine, Stopwatch, Task, Unsupported


def recipes(kind: str, task: Task) -> dict[str, Callable[[], Engine]]:
    def dynamic() -> Engine:
        module = copy.deepcopy(task.module)
        if kind == "image" and not any(isinstance(m, torch.nn.Linear) for m in module.modules()):
            raise Unsupported("dynamic quantisation has no convolutions")
        clock = Stopwatch()
        module = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, dtype=torch.qint8)
        spent = clock.read()
        return Engine(
            "torch int8 dynamic", lambda *i: lambda: module(*i), bytes=size_of(module), **spent,
        )  # fmt: skip

    return {"int8 dynamic": dynamic}


def size_of(module: torch.nn.Module) -> int:
    """Bytes of all that a module's state holds, packed weights included, each tensor once."""
    total, seen = 0, set()
    stack = list(module.state_dict().values())
    while stack:
        value = stack.pop()
        if isinstance(value, tuple | list):
            stack += value
        elif isinstance(value, torch.Tensor) and value.is_quantized:
            scales = value.q_per_channel_scales().nbytes if value.qscheme() != torch.per_tensor_affine else 4
            total += value.numel() * value.element_size() + scales
        elif isinstance(value, torch.Tensor) and (value.data_ptr(), value.shape) not in seen:
            seen.add((value.data_ptr(), value.shape))
            total += value.nbytes
    return total
