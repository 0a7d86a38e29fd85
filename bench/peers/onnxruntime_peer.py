"""ONNX Runtime on the CPU: float32, dynamic int8 for transformers, static QDQ int8 for image models."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from . import Engine, Stopwatch, Task


def export(task: Task, folder: Path, names: list[str]) -> Path:
    path = folder / "model.onnx"
    axes = {n: {d: f"{n}{d}" for d in range(1 if n == "pixels" else 2)} for n in names}
    example = task.calibration[0]
    torch.onnx.export(
        task.module, example, str(path), input_names=names, dynamic_axes=axes, dynamo=False, opset_version=17
    )
    return path


def prepare(path: Path, task: Task, names: list[str]):
    """What makes calls of a model out of inputs; the file may go."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    # Its threads spin while it runs, as by default, but not on into the turn of the next engine.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    content = path.read_bytes()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def call_for(*inputs):
        feed = {n: i.numpy() for n, i in zip(names, inputs)}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return call_for


def encoder(task: Task) -> list[Engine]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    names = ["input_ids", "attention_mask"]
    with tempfile.TemporaryDirectory() as folder:
        source, int8 = export(task, Path(folder), names), Path(folder) / "int8.onnx"
        clock = Stopwatch()
        quantize_dynamic(source, int8, weight_type=QuantType.QInt8, per_channel=True)
        seconds = float(clock)
        return [
            Engine("onnxruntime fp32", prepare(source, task, names), bytes=source.stat().st_size),
            Engine("onnxruntime int8", prepare(int8, task, names), seconds, int8.stat().st_size),
        ]


def image(task: Task) -> list[Engine]:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.samples = iter(task.calibration)

        def get_next(self):
            sample = next(self.samples, None)
            return None if sample is None else {"pixels": sample[0].numpy()}

    names = ["pixels"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, ready, int8 = export(task, folder, names), folder / "ready.onnx", folder / "int8.onnx"
        clock = Stopwatch()
        quant_pre_process(str(source), str(ready))
        quantize_static(
            ready, int8, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        seconds = float(clock)
        return [
            Engine("onnxruntime fp32", prepare(source, task, names), bytes=source.stat().st_size),
            Engine("onnxruntime int8", prepare(int8, task, names), seconds, int8.stat().st_size),
        ]
