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
SEED, CASES = 5, 200  # of every op, under the memory sanitizers


def run(*command: str | Path, **options) -> None:
    done = subprocess.run([str(c) for c in command], **options)
    if done.returncode != 0:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def build(sanitizers: str, target: str) -> Path:
    """The folder where CMake built a target with sanitizers."""
    import torch

    folder = ROOT / "build" / sanitizers.partition(",")[0]
    pybind = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    defines = {
        "NARROWCAST_SANITIZE": sanitizers,
        "NARROWCAST_CUDA": "OFF",
        "CMAKE_BUILD_TYPE": "None",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind,
        "TORCH_DIR": Path(torch.__file__).parent,
    }
    cmake = Path(sys.executable).parent / "cmake"
    cmake = cmake if cmake.exists() else Path("cmake")
    run(cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *(f"-D{k}={v}" for k, v in defines.items()))
    run(cmake, "--build", folder, "-j", str(len(os.sched_getaffinity(0))), "--target", target)
    return folder


def memory() -> None:
    """The library with AddressSanitizer and UBSan, in the real torch, under hostile input.

    Inputs come from guarded mappings there, so what is found here are scratch buffers, results of
    functional ops and undefined arithmetic. torch itself is not instrumented and leaks on purpose.
    """
    folder = build("address,undefined", "narrowcast_cpu")
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
        f"torch.ops.load_library = lambda p: real({str(folder)!r} + '/' + pathlib.Path(p).name)\n"
        f"sys.argv = ['hostile', '--cases', '{CASES}', '--seed', '{SEED}']\n"
        "from fuzz.hostile import main\n"
        "sys.exit(main())\n"
    )
    run(sys.executable, "-W", "ignore", "-c", code, cwd=ROOT / "tests", env=environment)


def threads() -> None:
    """Every room's loops on std::thread under ThreadSanitizer, without torch."""
    program = build("thread", "sanitize_threads") / "sanitize_threads"
    for isa in ("", "generic"):
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        if isa:
            environment["NARROWCAST_ISA"] = isa
        # Fixed addresses: the shadow memory of ThreadSanitizer does not allow for every random one.
        run("setarch", "-R", program, env=environment)


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
