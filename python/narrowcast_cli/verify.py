"""``narrowcast verify``: does a plan still reproduce its certificate, on this machine?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output


def verify(
    plan: Annotated[Path, typer.Argument(help="a .plan file")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    key: Annotated[
        str | None, typer.Option(help="Ed25519 public key, hexadecimal, that must have signed it")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Replay a plan's certificate here; exit code 3 when the outputs drifted or the file was altered."""
    from narrowcast.errors import ArgumentError, FormatError, VerificationError
    from narrowcast.graph import Plan
    from narrowcast.runtime.verify import verify as replay

    try:
        loaded = Plan.load(plan)
    except FormatError as error:
        raise VerificationError(str(error)) from error
    if key is not None:
        try:
            public = bytes.fromhex(key)
        except ValueError as error:
            raise ArgumentError("--key must be 64 hexadecimal digits") from error
        loaded.verify_signature(public)
    report = replay(loaded, device=device)
    if json:
        output.print_json({"plan": str(plan), **report.as_dict()})
        return
    rows = [[str(c.sample), str(c.output), f"{c.error:.3g}", f"{c.tolerance:.3g}"] for c in report.checks]
    columns = ["sample", "output", "error", "tolerance"]
    where = f"{report.device}, kernels {report.kernels}, {report.threads} threads"
    output.console().print(output.table(f"{plan} holds ({where})", columns, rows, {0, 1, 2, 3}))
