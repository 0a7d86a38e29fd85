"""What can be proven about GPU kernels without a GPU. Run by ``make gates``.

emulator     kernels of every room run on the CPU, watched for races, wrong waits and stray accesses
mutation     the same tests must notice when a barrier, a wait or an index of a kernel is wrong; survivors are explained
sass         nvcc compiles for sm_80 and sm_90a; the machine code keeps the promises of the ``// GATE`` lines
conformance  what compares common/ptx.cuh with the emulator on a GPU (tests/gpu) compiles for sm_80 and sm_90a
triton       every Triton kernel compiles ahead of time for sm_80, sm_90 and sm_100, and keeps its promises
library      the CUDA library builds, needs nothing of torch but its stable ABI, and registers its ops

A ``// GATE NAME: ...`` line of a kernel file holds for kernels whose mangled name matches NAME:
``registers <= N``, ``spills = 0``, ``contains INSTRUCTION ...``; NAME ``block``: ``shared <= BYTES``.
A tool that is absent is named, and its gate is reported as not run; a broken promise ends with 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from emulator import build, mutate, survivors  # noqa: E402
from gpu import conformance as on_a_gpu  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90a")
#: Mutants that must be noticed; the rest change nothing that counts, or nothing at all.
LEAST_CAUGHT = 0.95

results: list[tuple[str, str, str]] = []


def report(gate: str, state: str, text: str) -> None:
    results.append((gate, state, text))
    print(f"{state:8} {gate}: {text}", flush=True)


def tool(name: str) -> str | None:
    """On the PATH, in a CUDA toolkit, or in the wheels that carry it."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    for packages in {sysconfig.get_path("purelib"), *sys.path}:
        if packages and Path(packages).is_dir():
            folders += Path(packages).glob("nvidia/c*/bin")
            folders += [Path(packages) / "triton/backends/nvidia/bin"]
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)


def gates_of(kernel: Path) -> list[tuple[str, str]]:
    """(name, condition) of every promise in a kernel file."""
    lines = re.findall(r"^// GATE (\S+): (.+)$", kernel.read_text(), re.M)
    return [(name, condition.strip()) for name, text in lines for condition in text.split(",")]


def emulator() -> None:
    for name, (kernels, _) in build.PROGRAMS.items():
        done = subprocess.run([build.build(name)], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).strip().splitlines()
        report(
            f"emulator {name}", "FAILED" if done.returncode else "passed", lines[-1] if lines else "no output"
        )
        for line in lines[:-1][:10]:
            print("        ", line)
        used = re.search(r"at most (\d+) bytes of shared", done.stdout)
        for kernel in kernels:
            for where, condition in gates_of(ROOT / "kernels" / kernel):
                if where == "block" and used:
                    kept = int(used[1]) <= int(condition.split("<=")[1])
                    report(
                        f"emulator {name}", "passed" if kept else "FAILED", f"{condition}: {used[1]} bytes"
                    )


def mutation() -> None:
    for name, (kernels, _) in build.PROGRAMS.items():
        if not kernels:
            continue
        total, alive = mutate.run(name)
        order = [m for m in alive if m.what.startswith(("without", "waits"))]
        why = survivors.WHY.get(name, {})
        strange = [m for m in alive if m.what not in why]
        unknown = name in survivors.WHY and strange
        share = (total - len(alive)) / total
        text = f"{total - len(alive)} of {total} mutants noticed ({share:.1%}), {len(strange)} of the rest unexplained"
        failed = order or unknown or share < LEAST_CAUGHT
        report(f"mutation {name}", "FAILED" if failed else "passed", text)
        for mutant in alive:
            print(f"         not noticed: line {mutant.line}, {mutant.what}: {why.get(mutant.what, 'why?')}")


def registers_of(log: str) -> dict[str, tuple[int, int]]:
    """Kernel -> registers, bytes spilled or on the stack, from the log of ptxas."""
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, log, re.S):
        found[name] = (int(registers), int(stack) + int(stores) + int(loads))
    return found


def sass_of(cuobjdump: str, cubin: Path) -> dict[str, str]:
    env = {**os.environ}
    if disassembler := tool("nvdisasm"):
        env["PATH"] += f":{Path(disassembler).parent}"
    text = subprocess.run(
        [cuobjdump, "-sass", cubin], check=True, capture_output=True, text=True, env=env
    ).stdout
    parts = re.split(r"Function : (\w+)", text)
    return dict(zip(parts[1::2], parts[2::2]))


def contains(sass: str, instruction: str) -> bool:
    """Whether an instruction has all the parts of this one, in order: LDG.128 finds LDG.E.128.CONSTANT."""
    parts = [re.escape(part) for part in instruction.split(".")]
    return re.search(r"\b" + r"(?:\.\w+)*\.".join(parts) + r"\b", sass) is not None


def sass() -> None:
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    if not nvcc:
        return report("sass", "NOT RUN", "nvcc is absent")
    if not cuobjdump or not tool("nvdisasm"):
        report(
            "sass contains",
            "NOT RUN",
            "cuobjdump or nvdisasm is absent (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)",
        )
        cuobjdump = None
    kernels = sorted((ROOT / "kernels").rglob("*_sm80.cu"))
    with tempfile.TemporaryDirectory() as folder:
        for kernel, arch in ((k, a) for k in kernels for a in ARCHITECTURES):
            cubin = Path(folder) / "kernel.cubin"
            flags = ["-std=c++20", f"-arch={arch}", "--fmad=false", "-Xptxas", "-v", "-cubin", "-o", cubin]
            command = ["nice", nvcc, *flags, f"-I{ROOT / 'kernels'}", kernel]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            gate = f"sass {kernel.stem} {arch}"
            if done.returncode:
                report(gate, "FAILED", done.stderr.strip()[-2000:])
                continue
            used = registers_of(done.stderr)
            code = sass_of(cuobjdump, cubin) if cuobjdump else {}
            report(gate, *check_sass(kernel, used, code))


def check_sass(kernel: Path, used: dict[str, tuple[int, int]], code: dict[str, str]) -> tuple[str, str]:
    broken, kept = [], 0
    for where, condition in gates_of(kernel):
        if where == "block":
            continue
        matching = [name for name in used if re.search(where, name)]
        if not matching:
            broken.append(f"no kernel matches {where}")
        for name in matching:
            registers, spilled = used[name]
            word, *rest = condition.split()
            if word == "registers":
                bad = registers > int(rest[-1]) and f"{registers} registers"
            elif word == "spills":
                bad = spilled and f"{spilled} bytes of stack or spills"
            elif not code:
                continue
            else:
                bad = ", ".join(i for i in rest if not contains(code.get(name, ""), i))
            kept += not bad
            if bad:
                broken.append(f"{name}: {condition}, got {bad if word != 'contains' else 'no ' + bad}")
    most = max((registers for registers, _ in used.values()), default=0)
    text = f"{len(used)} kernels, {kept} promises kept, at most {most} registers"
    return ("FAILED", "\n    ".join(broken)) if broken else ("passed", text)


def conformance() -> None:
    if not (nvcc := tool("nvcc")):
        return report("conformance", "NOT RUN", "nvcc is absent")
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHITECTURES:
            try:
                on_a_gpu.compile_for(arch, Path(folder) / "program", nvcc)
            except subprocess.CalledProcessError as error:
                report(f"conformance {arch}", "FAILED", error.stderr.strip()[-2000:])
            else:
                report(f"conformance {arch}", "passed", f"{len(on_a_gpu.CASES)} cases compile")


#: Run beside a torch without CUDA, with a stand-in for the one function that its libtorch_cuda.so would have.
LOAD = """
import sys, torch, narrowcast
torch.ops.load_library(sys.argv[1])
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("narrowcast::")]
names = [n for n in names if n.endswith("_cuda")]
assert names and all(torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA") for n in names), names
op = torch.ops.narrowcast._quantize_int8_cuda.default
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    op.redispatch(keys, torch.zeros(2, 8), 0, torch.zeros(2, dtype=torch.int64))
except RuntimeError as error:
    assert "quantize_int8: x must be on a GPU" in str(error), error
else:
    raise SystemExit("a CPU tensor was taken for one on a GPU")
print(len(names))
"""


def library() -> None:
    if not tool("nvcc"):
        return report("library", "NOT RUN", "nvcc is absent")
    if not shutil.which("cmake") or not shutil.which("ninja"):
        return report("library", "NOT RUN", "cmake or ninja is absent")
    folder = ROOT / "build" / "gates"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DNARROWCAST_CUDA=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={tool('nvcc')}"]
    configure += [f"-Dpybind11_DIR={subprocess.getoutput(f'{sys.executable} -m pybind11 --cmakedir')}"]
    for command in (configure, ["nice", "ninja", "-C", folder, "-j2", "narrowcast_cuda"]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            return report("library", "FAILED", (done.stdout + done.stderr)[-2000:])
    built = folder / "libnarrowcast_cuda.so"
    symbols = subprocess.run(["nm", "-DCu", built], check=True, capture_output=True, text=True).stdout
    torch_symbols = [line for line in symbols.splitlines() if re.search(r"\b(at|c10|torch)::", line)]
    report(
        "library symbols",
        "FAILED" if torch_symbols else "passed",
        f"{len(torch_symbols)} symbols of torch's C++ ABI",
    )
    stand_in = folder / "stand_in"
    stand_in.mkdir(exist_ok=True)
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'
    (stand_in / "cuda.cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", stand_in / "cuda.cpp", "-o", stand_in / "libtorch_cuda.so"]
    subprocess.run([str(part) for part in command], check=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(stand_in)}
    done = subprocess.run([sys.executable, "-c", LOAD, built], capture_output=True, text=True, env=env)
    text = (
        f"{done.stdout.strip()} ops registered beside torch without CUDA"
        if not done.returncode
        else done.stderr[-2000:]
    )
    report("library loads", "FAILED" if done.returncode else "passed", text)


def triton() -> None:
    if not importlib.util.find_spec("triton"):
        return report("triton", "NOT RUN", "triton is absent (pip: triton)")
    import triton_gate  # beside this file

    if not tool("cuobjdump"):
        report("triton registers", "NOT RUN", "cuobjdump is absent")
    triton_gate.run(report, ROOT, tool("cuobjdump"))


GATES = {
    "emulator": emulator, "mutation": mutation, "sass": sass, "conformance": conformance, "triton": triton,
    "library": library,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "gates", nargs="*", metavar="GATE", help=f"some of {', '.join(GATES)}; all by default"
    )
    chosen = parser.parse_args().gates or list(GATES)
    begin = time.monotonic()
    for name in chosen:
        GATES[name]()
    failed = sum(state == "FAILED" for _, state, _ in results)
    absent = [f"{gate} ({text})" for gate, state, text in results if state == "NOT RUN"]
    print(f"{len(results)} gates, {failed} failed, {time.monotonic() - begin:.0f} s")
    if absent:
        print("not run:", "; ".join(absent))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
