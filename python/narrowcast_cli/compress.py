"""``narrowcast compress``: a model in, a plan out, with what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .inspect import write_report


def compress(
    source: Annotated[str, typer.Argument(help="a .gguf or .onnx file, or a Hugging Face folder")],
    out: Annotated[Path, typer.Option("-o", "--output", help="the .plan file to write")],
    recipe: Annotated[str, typer.Option(help="native, fp32, int8, int8-weight, int4 or auto")] = "int8",
    data: Annotated[
        str | None, typer.Option(help="calibration data: a text file, or a folder of texts or pictures")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="largest relative loss of the model's own metric, such as 0.01")
    ] = None,
    kv_cache: Annotated[
        str, typer.Option(help="float, int8 or int4: the cache of a language model")
    ] = "float",
    objective: Annotated[str, typer.Option(help="what recipe auto makes small: bytes or latency")] = "bytes",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="predict bytes, time and memory; write nothing")
    ] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="a multiple of 32: of weights (32), for int8 of activations (64; 0: one scale per token)"
        ),
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="int4 without zero points")] = False,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="turn a decoder's hidden states, where that loses less")
    ] = False,
    device: Annotated[str, typer.Option(help="the device that the plan is measured on")] = "cpu",
    seed: Annotated[int, typer.Option(help="of whatever is drawn at random")] = 0,
    report: Annotated[
        Path | None, typer.Option(help="write one self-contained HTML page about the plan")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compress a model and write a plan that carries its own certificate."""
    import narrowcast
    from narrowcast.files import check_writable

    if dry_run:
        prediction = narrowcast.predict(source, recipe=recipe, data=data, group_size=group_size, seed=seed)
        if json:
            output.print_json(prediction.as_dict())
        else:
            rows = [[name, value] for name, value in _predicted(prediction).items()]
            output.console().print(output.table("would take", ["what", "value"], rows))
        return
    for file in (out, report):
        if file is not None:
            check_writable(file)
    with output.progress(quiet=json) as progress:
        plan = narrowcast.compress(
            source, recipe=recipe, data=data, budget=budget, objective=objective, kv_cache=kv_cache,
            group_size=group_size, symmetric=symmetric, rotate=rotate, device=device, seed=seed, progress=progress,
            work=out.with_name(f".{out.name}.work"),
        )  # fmt: skip
        plan.save(out)
    content = None if report is None else write_report(narrowcast.Plan.load(out), report)
    summary = {
        "plan": str(out),
        "recipe": plan.recipe,
        "kind": plan.kind,
        "bytes_source": plan.source.get("bytes"),
        "bytes_float32": plan.record.get("bytes_float32"),
        "bytes_plan": out.stat().st_size,
        "metrics": plan.certificate.get("metrics", {}),
        "warnings": plan.record.get("warnings", []),
    }
    if json:
        output.print_json(summary if content is None else summary | {"report": content})
        return
    rows = [
        [name.replace("_", " "), _shown(name, value)] for name, value in summary.items() if name != "warnings"
    ]
    output.console().print(output.table("compressed", ["what", "value"], rows))
    for warning in summary["warnings"]:
        output.console().print(f"warning: {warning}", markup=False)
    if report is not None:
        output.console().print(f"wrote {report}", markup=False)


def _predicted(prediction) -> dict[str, str]:
    least, most = (output.size(b) for b in prediction.bytes)
    return {
        "recipe": prediction.recipe,
        "bytes of weights": least if least == most else f"{least} to {most}",
        "seconds": f"about {prediction.seconds:.0f}",
        "peak of memory": f"about {output.size(prediction.peak)}",
        "memory there is": output.size(prediction.available),
        "notes": "; ".join(prediction.notes),
    }


def _shown(name: str, value) -> str:
    if name.startswith("bytes") and value is not None:
        return output.size(value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
    return str(value)
