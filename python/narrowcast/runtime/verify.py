"""The certificate of a plan: recorded when it is made, replayed on any machine.

``Plan.samples`` holds inputs and references, ``Plan.certificate["replay"]`` what was measured:

- ``input.<i>.<position>``: the inputs of sample i. A decoder has one, token ids [B, S].
- ``reference.<i>.<position>``: the outputs that torch computed in float32 from the original model. For a
  decoder the logits [B, R, V] of the last R positions.
- replay: one entry per reference, ``{"sample", "output", "error", "tolerance"}``. Error is
  ||out - reference|| / ||reference||; a machine that exceeds the tolerance has drifted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, VerificationError
from ..graph.plan import Plan
from .executor import Executor

#: Room for another machine's kernels: rounding flips a few int8 codes, which moves the error a little.
RELATIVE_SLACK, ABSOLUTE_SLACK = 0.25, 1e-3


@dataclass(frozen=True)
class Check:
    """One output of one sample: the error measured here, and what the plan allows."""

    sample: int
    output: int
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Report:
    """What :func:`verify` measured, and where."""

    checks: list[Check]
    device: str
    kernels: str
    threads: int

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; an error that is not a number is None."""
        checks = [asdict(c) | {"ok": c.ok} for c in self.checks]
        for c in checks:
            c["error"] = c["error"] if math.isfinite(c["error"]) else None
        return {
            "ok": self.ok,
            "checks": checks,
            "device": self.device,
            "kernels": self.kernels,
            "threads": self.threads,
        }

    def __str__(self) -> str:
        lines = [
            f"sample {c.sample} output {c.output}: error {c.error:.3g}, tolerance {c.tolerance:.3g}"
            f"{'' if c.ok else '  DRIFT'}"
            for c in self.checks
        ]
        return "\n".join([f"{self.device}, kernels {self.kernels}, {self.threads} threads", *lines])


def certify(
    plan: Plan, samples: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], device: str = "cpu"
) -> Report:
    """Writes samples, as (inputs, references), and the errors measured on `device` into the plan."""
    plan.samples = {}
    for i, (inputs, references) in enumerate(samples):
        plan.samples |= {f"input.{i}.{p}": t.detach().cpu() for p, t in enumerate(inputs)}
        plan.samples |= {f"reference.{i}.{p}": t.detach().cpu().float() for p, t in enumerate(references)}
    report = _replay(plan, Executor(plan, device=device), {})
    plan.certificate["replay"] = [
        {
            "sample": c.sample,
            "output": c.output,
            "error": c.error,
            "tolerance": c.error * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK,
        }
        for c in report.checks
    ]
    plan.certificate["measured_on"] = {
        "device": report.device, "kernels": report.kernels, "torch": torch.__version__,
    }  # fmt: skip
    return report


def verify(plan: Plan | str | os.PathLike, device: str = "auto", threads: int | None = None) -> Report:
    """Runs the samples of a plan here and compares with its certificate.

    Raises VerificationError when an output is further from its reference than the plan allows, or when
    the plan has no certificate; FormatError when the certificate is not well formed.
    """
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    entries = plan.certificate.get("replay")
    if not entries:
        raise VerificationError("the plan has no certificate to replay; compress the model with data")
    try:
        tolerances = {(int(e["sample"]), int(e["output"])): float(e["tolerance"]) for e in entries}
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError("the plan's certificate is not well formed: replay") from error
    report = _replay(plan, Executor(plan, device=device, threads=threads), tolerances)
    measured = {(c.sample, c.output) for c in report.checks}
    if measured != set(tolerances):
        raise FormatError("the plan's certificate is not well formed: samples and replay differ")
    if not report.ok:
        raise VerificationError(f"outputs drifted from the certificate\n{report}")
    return report


def _replay(plan: Plan, exe: Executor, tolerances: dict[tuple[int, int], float]) -> Report:
    checks = []
    for i in sorted({_index(name) for name in plan.samples}):
        inputs = _group(plan, "input", i)
        outputs = [exe.logits(*inputs)] if plan.kind == "decoder" else exe(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        references = _group(plan, "reference", i)
        if len(outputs) != len(references):
            raise FormatError("the plan's certificate is not well formed: number of outputs")
        for j, (out, reference) in enumerate(zip(outputs, references)):
            if plan.kind == "decoder":
                out = out[:, -reference.shape[1] :]
            if out.shape != reference.shape:
                raise FormatError("the plan's certificate is not well formed: shape of a reference")
            checks.append(Check(i, j, _error(out, reference), tolerances.get((i, j), math.inf)))
    kernels = torch.ops.narrowcast._isa() if exe.device.type == "cpu" else "cuda"
    return Report(checks, str(exe.device), kernels, exe.threads)


def _index(name: str) -> int:
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in ("input", "reference") or not parts[1].isdecimal():
        raise FormatError(f"the plan's certificate is not well formed: {name[:80]}")
    return int(parts[1])


def _group(plan: Plan, kind: str, index: int) -> list[Tensor]:
    names = [n for n in plan.samples if n.startswith(f"{kind}.{index}.")]
    wanted = [f"{kind}.{index}.{p}" for p in range(len(names))]
    if not names or set(names) != set(wanted):
        raise FormatError(f"the plan's certificate is not well formed: {kind} {index}")
    return [plan.samples[n] for n in wanted]


def _error(out: Tensor, reference: Tensor) -> float:
    out, reference = out.double().cpu(), reference.double()
    norm = reference.norm().item()
    error = (out - reference).norm().item()
    return error / norm if norm else error
