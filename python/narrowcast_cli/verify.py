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
    report = replay(loaded, device=device).as_dict()
    if json:
        output.print_json(report)
        return
    rows = [[str(name), str(value)] for name, value in report.items()]
    output.console().print(output.table(f"{plan} holds", ["what", "value"], rows))
