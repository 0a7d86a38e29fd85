"""OpenVINO on the CPU: float32, the bfloat16 hint, and int8 by NNCF's post-training quantisation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from . import Engine, Stopwatch, Task


def call_of(request, inputs):
    arrays = [i.numpy() for i in inputs]
    return lambda: torch.from_numpy(request.infer(arrays)[0])


def request_of(source, threads: int, precision: str = "f32"):
    """A request of a compiled model."""
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    return openvino.Core().compile_model(source, "CPU", options).create_infer_request()


def compiled(source, inputs, threads: int, precision: str = "f32"):
    """The call of a model compiled for the shapes of these inputs."""
    fixed = source.clone()
    fixed.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
    return call_of(request_of(fixed, threads, precision), inputs)


def _variants(task: Task, transformer: bool) -> list[Engine]:
    import nncf
    import openvino

    example = task.calibration[0]
    model = openvino.convert_model(task.module, example_input=example)
    nncf.set_log_level(40)

    def prepare(source, precision: str):
        return lambda *inputs: compiled(source, inputs, task.threads, precision)

    clock = Stopwatch()
    options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    data = nncf.Dataset([[i.numpy() for i in sample] for sample in task.calibration])
    int8 = nncf.quantize(model, data, subset_size=len(task.calibration), **options)
    seconds = float(clock)
    return [
        Engine("openvino fp32", prepare(model, "f32"), bytes=size_of(model)),
        Engine("openvino bf16", prepare(model, "bf16"), bytes=size_of(model)),
        Engine("openvino int8", prepare(int8, "f32"), seconds, size_of(int8)),
        Engine("openvino int8 bf16", prepare(int8, "bf16"), seconds, size_of(int8)),
    ]


def size_of(model) -> int:
    """Of the weights on disk."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, Path(folder) / "model.xml", compress_to_fp16=False)
        return (Path(folder) / "model.bin").stat().st_size


def encoder(task: Task) -> list[Engine]:
    return _variants(task, True)


def image(task: Task) -> list[Engine]:
    return _variants(task, False)
