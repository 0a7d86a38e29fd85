"""``narrowcast doctor``: what is installed, what this machine offers, and what that means."""

from __future__ import annotations

from typing import Annotated

import typer

from . import output


def doctor(json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Show the installation, the CPU kernels and GPU of this machine, and run one op as a check."""
    facts = collect()
    if json:
        output.print_json(facts)
    else:
        rows = [[name, str(value)] for name, value in facts.items() if name != "notes"]
        output.console().print(output.table("narrowcast", ["what", "found"], rows))
        for note in facts["notes"]:
            output.console().print(f"- {note}")
    if facts["self_test"] != "passed":
        raise typer.Exit(output.FAILED)


def collect() -> dict:
    import importlib.util
    import platform

    import torch

    import narrowcast
    from narrowcast.runtime.threads import cpu_name, default_threads

    ops = torch.ops.narrowcast
    notes = narrowcast.show_config().splitlines()[2:]
    optional = {
        "triton": "Triton kernels on GPUs",
        "tokenizers": "text in and out of language models",
        "transformers": "Hugging Face models",
        "onnx": "ONNX files",
        "matplotlib": "plots of inspect",
        "cupy": "CuPy arrays",
    }
    for package, use in optional.items():
        if importlib.util.find_spec(package) is None:
            notes.append(f"{package} is not installed: no {use}")
    facts = {
        "version": narrowcast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cpu kernels": ops._isa(),
        "threads": default_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "self_test": self_test(),
        "notes": notes,
    }
    return facts


def self_test() -> str:
    """One quantised product against exact integers, through every kernel that runs here."""
    import torch

    ops = torch.ops.narrowcast
    x, w = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((5, 96), (33, 96)))
    expected = (x.long() @ w.long().t()).float()
    for variant in ops._op_variants("linear_int8").split(","):
        ops._force_variant("linear_int8", variant)
        try:
            y = ops.linear_int8(x, torch.ones(5), w, torch.ones(33))
        finally:
            ops._force_variant("linear_int8", "")
        if not torch.equal(y, expected):
            return f"failed: kernel {variant} of linear_int8 computed wrong numbers"
    return "passed"
