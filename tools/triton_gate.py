"""Compiles what the ``AOT`` lists of the Triton files name, for GPUs that are not here, and reads the result.

Kept for every architecture: no spills, registers and shared memory within bounds, tensor-core instructions
and 16-byte loads where promised. And what the interpreter cannot show compiles too: Triton turns an integer
argument of 1 into a constant, and passes one beyond 2^31 in 64 bits.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

#: Compute capability -> bytes of shared memory that a block may have there. 86, 89 and 120 run what 80 does within 99 KiB.
ARCHITECTURES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*"
#: By a thread, into shared memory, by the tensor memory accelerator.
WIDE_LOADS = (
    r"\bld\.global[\w.:]*\.v[48]\.b32|\bld\.global[\w.:]*\.v2\.b64|cp\.async\.cg\.[^;]*0x10|cp\.async\.bulk"
)


def modules(root: Path) -> list[str]:
    """Names of the Triton files of every room."""
    files = sorted((root / "kernels").glob("*/*_triton.py"))
    return [f"narrowcast.kernels.{path.parent.name}.{path.stem}" for path in files]


def resources(cuobjdump: str, cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump names no registers: {text[-500:]}")
    return int(found[1]), int(found[2])


def compiled_for(spec, capability: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(spec.kernel, spec.signature(), spec.constants(), spec.divisible())
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": spec.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def with_integers(spec, value):
    """The specialisation with every size and stride of the launch replaced; a zero point is neither.

    What the kernel asks not to specialise never becomes a constant.
    """
    kept = {p.name for p in spec.kernel.params if value == 1 and p.do_not_specialize}
    arguments = {
        name: value
        if spec.is_type(v) and re.match(r"[iu]\d", v) and "zero_point" not in name and name not in kept
        else v
        for name, v in spec.arguments.items()
    }
    return dataclasses.replace(spec, arguments=arguments)


def broken_promises(spec, capability: int, cuobjdump: str | None) -> tuple[list[str], int]:
    """What a compiled specialisation does not keep, and its registers."""
    compiled = compiled_for(spec, capability)
    ptx, broken, registers = compiled.asm["ptx"], [], 0
    if compiled.metadata.shared > ARCHITECTURES[capability]:
        broken.append(f"{compiled.metadata.shared} bytes of shared memory")
    products = set(re.findall(TENSOR_CORES, ptx)) if spec.tensor_cores else set()
    if spec.tensor_cores and not products:
        broken.append("no tensor-core instruction")
    if isinstance(spec.tensor_cores, str):
        broken += [p for p in sorted(products) if spec.tensor_cores not in p.split(".")]
    if spec.wide_loads and not re.search(WIDE_LOADS, ptx):
        broken.append("no 16-byte loads")
    if cuobjdump:
        registers, stack = resources(cuobjdump, compiled.asm["cubin"])
        if stack:
            broken.append(f"{stack} bytes of stack or spills")
        if registers > spec.registers:
            broken.append(f"{registers} registers")
    return broken, registers


def run(report: Callable[[str, str, str], None], root: Path, cuobjdump: str | None, only: str = "") -> None:
    for name in modules(root):
        if only not in name:
            continue
        module, stem = importlib.import_module(name), name.rpartition(".")[2]
        if not getattr(module, "AOT", None):
            report(f"triton {stem}", "FAILED", "has no AOT list")
            continue
        broken, most = [], 0
        for spec in module.AOT:
            for capability in spec.architectures:
                try:
                    promises, registers = broken_promises(spec, capability, cuobjdump)
                except Exception as error:
                    promises, registers = [f"does not compile: {error}"[-2000:]], 0
                broken += [f"{spec.label} sm_{capability}: {promise}" for promise in promises]
                most = max(most, registers)
            for what, value in (("integers of 1", 1), ("64-bit integers", "i64")):
                try:
                    compiled_for(with_integers(spec, value), min(spec.architectures))
                except Exception as error:
                    broken.append(f"{spec.label} with {what}: does not compile: {error}"[-2000:])
        text = f"{len(module.AOT)} kernels for at most {len(ARCHITECTURES)} architectures, at most {most} registers"
        report(f"triton {stem}", "FAILED" if broken else "passed", "\n    ".join(broken) or text)
