"""ONNX Runtime's quantisation: dynamic, static QDQ, and MatMulNBits."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from . import Engine, Stopwatch, Task
from .onnxruntime_peer import export, prepare

NAMES = {"encoder": ["input_ids", "attention_mask"], "image": ["pixels"], "decoder": ["input_ids"]}


def recipes(kind: str, task: Task) -> dict[str, Callable[[], Engine]]:
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        matmul_nbits_quantizer,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names, folder = NAMES[kind], tempfile.TemporaryDirectory()
    place = Path(folder.name)

    @cache
    def source() -> Path:
        return export(task, place, names)

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.samples = iter(task.calibration)

        def get_next(self):
            sample = next(self.samples, None)
            return None if sample is None else {n: x.numpy() for n, x in zip(names, sample)}

    def engine(name: str, quantise: Callable[[Path, Path], None]) -> Callable[[], Engine]:
        def make() -> Engine:
            original, out = source(), place / "quantised.onnx"
            clock = Stopwatch()
            quantise(original, out)
            spent = clock.read()
            made = Engine(f"onnxruntime {name}", prepare(out, task, names), bytes=out.stat().st_size, **spent)
            folder.name  # noqa: B018 (the folder lives as long as a recipe does)
            return made

        return make

    def dynamic(original: Path, out: Path) -> None:
        quantize_dynamic(original, out, weight_type=QuantType.QInt8, per_channel=True)

    def prepared(original: Path, out: Path) -> None:
        # Its symbolic shapes know convolutions, and stop at an attention mask.
        quant_pre_process(str(original), str(out), skip_symbolic_shape=kind != "image")

    def static(method: CalibrationMethod) -> Callable[[Path, Path], None]:
        def quantise(original: Path, out: Path) -> None:
            ready = place / "ready.onnx"
            with contextlib.chdir(place):  # preparing leaves files where it runs
                prepared(original, ready)
            quantize_static(
                ready, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, calibrate_method=method,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip

        return quantise

    def blocks(**options) -> Callable[[Path, Path], None]:
        def quantise(original: Path, out: Path) -> None:
            # accuracy_level 4: activations to int8, its fastest way on CPUs.
            quantiser = matmul_nbits_quantizer.MatMulNBitsQuantizer(
                onnx.load(str(original)), accuracy_level=4, **options
            )
            quantiser.process()
            onnx.save(quantiser.model.model, str(out))

        return quantise

    def hqq(block_size: int) -> Callable[[Path, Path], None]:
        config = matmul_nbits_quantizer.HQQWeightOnlyQuantConfig(block_size=block_size, bits=4)
        return blocks(algo_config=config, block_size=block_size)

    if kind == "image":
        offered = {
            "int8 static QDQ": static(CalibrationMethod.MinMax),
            "int8 static QDQ, percentile": static(CalibrationMethod.Percentile),
        }
    else:
        offered = {
            "int8 dynamic": dynamic,
            "int4 MatMulNBits g64 sym": blocks(block_size=64, is_symmetric=True),
            "int4 MatMulNBits g64": blocks(block_size=64, is_symmetric=False),
            "int4 MatMulNBits g64 HQQ": hqq(64),
        }
    if kind == "encoder":
        offered["int8 static QDQ"] = static(CalibrationMethod.MinMax)
    if kind == "decoder":
        offered["int4 MatMulNBits g32"] = blocks(block_size=32, is_symmetric=False)
    return {name: engine(name, quantise) for name, quantise in offered.items()}
