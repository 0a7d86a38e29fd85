"""``narrowcast eval``: what a plan, or a model in float32, is worth on data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output


def evaluate(
    plan: Annotated[
        str, typer.Argument(help="a .plan file; or a model (.gguf, .onnx, Hugging Face folder), in float32")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help="a text file or a folder of .txt files; a folder of pictures, or with a subfolder per label"
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            help="the model that the plan was made from, or another plan; default: the plan's source file, "
            "when it lies beside the plan"
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="labels of pictures: a .csv (file,label) or .json file")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="at most so many windows of 512 tokens, texts or pictures")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure a plan on data, with 95 % bounds: perplexity and KL, cosine, or agreement and accuracy."""
    import narrowcast

    with output.progress(quiet=json) as report:
        result = narrowcast.evaluate(
            plan, data, reference, labels, limit=limit, device=device, threads=threads, progress=report
        )
    if json:
        output.print_json({"plan": plan, "data": str(data), **result.as_dict()})
        return
    against = "" if result.reference is None else f" against {result.reference}"
    rows = [[m.name, f"{m.value:.5g}", f"{m.low:.5g} .. {m.high:.5g}"] for m in result.metrics.values()]
    title = f"{plan} ({result.recipe}){against}, {result.count} {result.unit}"
    console = output.console()
    # Not the table's title, which would be folded to the table's width.
    console.print(title, soft_wrap=True)
    console.print(output.table("", ["metric", "value", "95 % bounds"], rows, {1, 2}))
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
