"""The sanitizers: memory and undefined behaviour under the op tests, races under a torch-free program.

python tools/sanitize.py              # both
python tools/sanitize.py --only memory|threads
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ["-O1", "-g", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
#: The flags of a file by its suffix, as in CMakeLists.txt.
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
SUFFIXES = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx2", "-mfma", "-mf16c", *WIDE],
    "_avx512bf16": ["-mavx2", "-mfma", "-mf16c", *WIDE, "-mavx512bf16"],
    "_amx": ["-mavx2", "-mfma", "-mf16c", *WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
CASES = 40  # of every op, under the memory sanitizers


def run(*command: str | Path, **options) -> None:
    done = subprocess.run([str(c) for c in command], **options)
    if done.returncode != 0:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def jobs() -> str:
    return str(len(os.sched_getaffinity(0)))


def memory() -> None:
    """The library with AddressSanitizer and UBSan, in the real torch, under hostile input.

    Inputs come from guarded mappings there, so what is found here are scratch buffers, results of
    functional ops and undefined arithmetic. torch itself is not instrumented and leaks on purpose.
    """
    import torch

    build = ROOT / "build" / "asan"
    pybind = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    defines = {
        "NARROWCAST_SANITIZE": "address,undefined",
        "NARROWCAST_CUDA": "OFF",
        "CMAKE_BUILD_TYPE": "None",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind,
        "TORCH_DIR": Path(torch.__file__).parent,
    }
    cmake = Path(sys.executable).parent / "cmake"
    cmake = cmake if cmake.exists() else Path("cmake")
    run(cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *(f"-D{k}={v}" for k, v in defines.items()))
    run(cmake, "--build", build, "-j", jobs(), "--target", "narrowcast_cpu")
    # libstdc++ with it: Python does not link it, and the runtime must find what throws before it starts.
    preload = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    # Loaded in place of the installed library: the ops register once, from whichever file comes first.
    code = (
        "import pathlib, sys, torch\n"
        "real = torch.ops.load_library\n"
        f"torch.ops.load_library = lambda p: real({str(build)!r} + '/' + pathlib.Path(p).name)\n"
        f"sys.argv = ['hostile', '--cases', '{CASES}']\n"
        "from fuzz.hostile import main\n"
        "sys.exit(main())\n"
    )
    run(sys.executable, "-W", "ignore", "-c", code, cwd=ROOT / "tests", env=environment)


def threads() -> None:
    """Every room's loops on std::thread under ThreadSanitizer, without torch."""
    build = ROOT / "build" / "tsan"
    build.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "tests" / "sanitize_threads.cpp"]
    sources += [p for p in sorted((ROOT / "kernels").rglob("*.cpp")) if "torch" not in _includes(p)]
    flags = [*FLAGS, "-fsanitize=thread", f"-I{ROOT / 'kernels'}"]
    running: list[tuple[Path, subprocess.Popen]] = []
    objects = []
    for source in sources:
        out = build / (source.stem + ".o")
        objects.append(out)
        suffix = next((f for s, f in SUFFIXES.items() if source.stem.endswith(s)), [])
        while len(running) >= int(jobs()):
            _finish(running)
        running.append((source, subprocess.Popen(["g++", *flags, *suffix, "-c", source, "-o", out])))
    while running:
        _finish(running)
    run("g++", "-fsanitize=thread", *objects, "-o", build / "threads", "-lpthread")
    for isa in ("", "generic"):
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        if isa:
            environment["NARROWCAST_ISA"] = isa
        # Fixed addresses: the shadow memory of ThreadSanitizer does not allow for every random one.
        run("setarch", "-R", build / "threads", env=environment)


def _includes(source: Path) -> str:
    """ "torch" for a file that needs it: tensors stop in the _cpu files."""
    return "torch" if source.stem.endswith(("_cpu", "_types")) or source.stem == "library" else ""


def _finish(running: list[tuple[Path, subprocess.Popen]]) -> None:
    source, process = running.pop(0)
    if process.wait() != 0:
        raise SystemExit(f"cannot compile {source}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("memory", "threads"))
    options = parser.parse_args()
    for name, check in (("threads", threads), ("memory", memory)):
        if options.only in (None, name):
            start = time.monotonic()
            check()
            print(f"{name}: nothing found, {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
