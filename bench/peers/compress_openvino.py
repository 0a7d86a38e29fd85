"""NNCF's post-training quantisation and weight compression, run by OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from . import Engine, Stopwatch, Task
from .openvino_peer import call_of, compiled, request_of, size_of


def recipes(kind: str, task: Task) -> dict[str, Callable[[], Engine]]:
    import nncf
    import openvino

    nncf.set_log_level(40)

    @cache
    def source():
        return openvino.convert_model(task.module, example_input=task.calibration[0])

    def data(samples=task.calibration):
        return nncf.Dataset([[i.numpy() for i in sample] for sample in samples])

    def engine(name: str, quantise: Callable) -> Callable[[], Engine]:
        def make() -> Engine:
            model = source().clone()  # compress_weights works in place
            clock = Stopwatch()
            model = quantise(model)
            spent = clock.read()
            # Held-out data has many shapes: one compilation serves them all.
            request = cache(lambda: request_of(model, task.threads))
            return Engine(
                f"openvino {name}", lambda *i: call_of(request(), i), bytes=size_of(model),
                timed=lambda *i: compiled(model, i, task.threads), **spent,
            )  # fmt: skip

        return make

    def post_training(**options) -> Callable:
        if kind != "image":
            options["model_type"] = nncf.ModelType.TRANSFORMER
        return lambda model: nncf.quantize(model, data(), subset_size=len(task.calibration), **options)

    def weights(mode: str, with_data: int = 0, **options) -> Callable:
        if mode.startswith("INT4"):
            options |= {"ratio": 1.0, "group_size": options.get("group_size", 64)}
        mode = nncf.CompressWeightsMode[mode]

        def quantise(model):
            if with_data:
                options.update(dataset=data(task.calibration[:with_data]), subset_size=with_data)
            return nncf.compress_weights(model, mode=mode, **options)

        return quantise

    if kind == "image":
        offered = {
            "int8 PTQ": post_training(),
            "int8 PTQ, accurate bias correction": post_training(fast_bias_correction=False),
        }
    else:
        count = len(task.calibration)
        offered = {
            "int8 PTQ": post_training(),
            "int8 weights": weights("INT8_ASYM"),
            "int4 weights g64 sym": weights("INT4_SYM"),
            "int4 weights g64": weights("INT4_ASYM"),
            "int4 weights g64 AWQ + scale estimation": weights(
                "INT4_ASYM", count, awq=True, scale_estimation=True
            ),
            "int4 weights g64 GPTQ": weights("INT4_ASYM", count, gptq=True),
        }
    if kind == "decoder":
        offered |= {
            "int4 weights g32 sym": weights("INT4_SYM", group_size=32),
            "int4 weights g32 AWQ + scale estimation": weights(
                "INT4_ASYM", count, awq=True, scale_estimation=True, group_size=32
            ),
            "int4 weights g128": weights("INT4_ASYM", group_size=128),
        }
    return {name: engine(name, quantise) for name, quantise in offered.items()}
