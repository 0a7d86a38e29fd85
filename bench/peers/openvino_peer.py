"""OpenVINO on the CPU: float32, the bfloat16 hint, and int8 by NNCF's post-training quantisation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from . import Engine, Stopwatch, Task


def _variants(task: Task, transformer: bool, shapes) -> list[Engine]:
    import nncf
    import openvino

    example = task.calibration[0]
    model = openvino.convert_model(task.module, example_input=example)
    nncf.set_log_level(40)

    def prepare(source, precision: str):
        def call_for(*inputs):
            fixed = source.clone()
            fixed.reshape(shapes(fixed, inputs))
            options = {
                "INFERENCE_NUM_THREADS": task.threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": precision,
            }
            request = openvino.Core().compile_model(fixed, "CPU", options).create_infer_request()
            arrays = [i.numpy() for i in inputs]
            return lambda: torch.from_numpy(request.infer(arrays)[0])

        return call_for

    clock = Stopwatch()
    options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    data = nncf.Dataset([[i.numpy() for i in sample] for sample in task.calibration])
    int8 = nncf.quantize(model, data, subset_size=len(task.calibration), **options)
    seconds = float(clock)
    return [
        Engine("openvino fp32", prepare(model, "f32"), bytes=_bytes(model)),
        Engine("openvino bf16", prepare(model, "bf16"), bytes=_bytes(model)),
        Engine("openvino int8", prepare(int8, "f32"), seconds, _bytes(int8)),
        Engine("openvino int8 bf16", prepare(int8, "bf16"), seconds, _bytes(int8)),
    ]


def _bytes(model) -> int:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, Path(folder) / "model.xml", compress_to_fp16=False)
        return (Path(folder) / "model.bin").stat().st_size


def _shapes(model, inputs) -> dict[int, list[int]]:
    return {i: list(x.shape) for i, x in enumerate(inputs)}


def encoder(task: Task) -> list[Engine]:
    return _variants(task, True, _shapes)


def image(task: Task) -> list[Engine]:
    return _variants(task, False, _shapes)
