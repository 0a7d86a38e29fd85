"""torchao: int8 and int4 configurations for dense layers, and static int8 through its export flow for images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from . import Engine, Stopwatch, Task


def recipes(kind: str, task: Task) -> dict[str, Callable[[], Engine]]:
    import torchao  # noqa: F401

    if kind == "image":
        return {"int8 static pt2e": lambda: _exported(task)}
    from torchao import quantization as ao

    def dense(name: str, bits: int, config) -> Callable[[], Engine]:
        def make() -> Engine:
            module = copy.deepcopy(task.module)
            clock = Stopwatch()
            ao.quantize_(module, config)
            spent = clock.read()
            return Engine(
                f"torchao {name}", lambda *i: lambda: module(*i), bytes=_size_of(module, bits),
                note="codes are held in 8 bits, and counted as 4" if bits == 4 else "", **spent,
            )  # fmt: skip

        return make

    group = ao.PerGroup(64)
    offered = {
        "int8 dynamic": (8, ao.Int8DynamicActivationInt8WeightConfig()),
        "int8 weights": (8, ao.Int8WeightOnlyConfig()),
        "int4 weights g64": (4, ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)),
        "int4 weights g64, int8 dynamic": (
            4, ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group),
        ),
    }  # fmt: skip
    return {name: dense(name, bits, config) for name, (bits, config) in offered.items()}


def _size_of(module: torch.nn.Module, bits: int) -> int:
    total, seen = 0, set()
    for tensor in [*module.parameters(), *module.buffers()]:
        codes = getattr(tensor, "qdata", None)
        if codes is not None:
            rest = (getattr(tensor, name, None) for name in ("scale", "zero_point"))
            total += codes.numel() * bits // 8 + sum(t.nbytes for t in rest if t is not None)
        elif tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.nbytes
    return total


def _exported(task: Task) -> Engine:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    example = task.calibration[0]
    # A batch of one would be taken for a constant.
    two = tuple(torch.cat((x, x)) for x in example)
    dynamic = tuple({0: torch.export.Dim("batch", min=1, max=512)} for _ in two)
    graph = torch.export.export(task.module, two, dynamic_shapes=(dynamic,) if len(two) > 1 else dynamic)
    quantiser = x86_inductor_quantizer.X86InductorQuantizer()
    quantiser.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config())
    clock = Stopwatch()
    prepared = prepare_pt2e(graph.module(), quantiser)
    for sample in task.calibration:
        prepared(*sample)
    module = convert_pt2e(prepared)
    spent = clock.read()

    def timed(*inputs):
        fast = torch.compile(module, options={"freezing": True})
        return lambda: fast(*inputs)

    size = sum(t.nbytes for t in module.state_dict().values() if isinstance(t, torch.Tensor))
    return Engine("torchao int8 static pt2e", lambda *i: lambda: module(*i), bytes=size, timed=timed, **spent)
