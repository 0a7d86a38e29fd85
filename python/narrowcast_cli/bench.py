"""``narrowcast bench``: how fast a plan runs here, beside what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output


def bench(
    plan: Annotated[Path, typer.Argument(help="a .plan file")],
    vs: Annotated[
        str, typer.Option(help="peers, comma separated: torch, onnxruntime, openvino, llama.cpp")
    ] = "",
    source: Annotated[str | None, typer.Option(help="the original model, needed for --vs")] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    repeats: Annotated[int, typer.Option(min=3, help="runs per case; the median is shown")] = 9,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    profile: Annotated[bool, typer.Option("--profile", help="time of every node")] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time a plan over its usual cases; with --vs, interleaved with peers in the same run."""
    import narrowcast
    from narrowcast.errors import ArgumentError
    from narrowcast.runtime.timing import cases_of, measure, peers_of

    names = [name.strip() for name in vs.split(",") if name.strip()]
    if names and source is None:
        raise ArgumentError("--vs needs --source: the original model that the peers run")
    executor = narrowcast.load(plan, device=device, threads=threads)
    peers = peers_of(names, source, executor) if names else {}
    rows = []
    for case in cases_of(executor):
        times = measure({"narrowcast": case.run, **{n: p[case.name] for n, p in peers.items()}}, repeats)
        rows.append({"case": case.name, "unit": "ms", **times})
    profiles = {}
    if profile:
        profiles = {case.name: executor.profile(*case.inputs) for case in cases_of(executor)}
    if json:
        for row in rows:
            row |= {"profile": profiles[row["case"]].as_dict()} if profile else {}
        output.print_json({"plan": str(plan), "threads": executor.threads, "cases": rows})
        return
    shown = []
    for row in rows:
        ours = row["narrowcast"]
        cells = [row["case"], f"{ours['median']:.3f}", f"{ours['low']:.3f} .. {ours['high']:.3f}"]
        for name in names:
            cells.append(f"{row[name]['median']:.3f} ({row[name]['median'] / ours['median']:.2f}x)")
        shown.append(cells)
    title = f"{plan}, {executor.threads} threads, ms (median of {repeats})"
    columns = ["case", "narrowcast", "spread", *names]
    output.console().print(output.table(title, columns, shown, set(range(1, len(columns)))))
    for name, times in profiles.items():
        output.console().print(f"\n{name}")
        print(times)
