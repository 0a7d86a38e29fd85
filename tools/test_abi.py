"""The binary promise: one wheel, built with one torch, serves every torch from 2.11 on.

python tools/test_abi.py                     # build a wheel, look inside, check its symbols
python tools/test_abi.py --torch 2.14.0      # and run the ops with another torch (gigabytes of download)
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = "0x020b000000000000ULL"  # torch 2.11, the oldest that is served
SHIMS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
OP_TESTS = ["tests/test_quantize.py", "tests/test_linear_int8.py", "tests/test_norm.py"]


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def build_wheel(into: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", into, ROOT)
    (wheel,) = into.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> list[str]:
    names = zipfile.ZipFile(wheel).namelist()
    problems = []
    for needed in (
        "narrowcast/libnarrowcast_cpu.so",
        "narrowcast/py.typed",
        "narrowcast/kernels/__init__.py",
    ):
        if needed not in names:
            problems.append(f"the wheel lacks {needed}")
    if not any(n.startswith("narrowcast/_runtime.") and n.endswith(".so") for n in names):
        problems.append("the wheel lacks narrowcast/_runtime")
    sources = [n for n in names if n.endswith((".cpp", ".cu", ".cuh", ".h", ".inc"))]
    return problems + [f"the wheel holds the source {n}" for n in sources]


def undefined_symbols(library: Path) -> set[str]:
    """Names that the library expects from others, without their versions."""
    lines = run("nm", "--dynamic", "--undefined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def promised_functions() -> set[str]:
    """C functions that torch's headers declare for the oldest version; they guard what came later."""
    include = Path(find_spec("torch").origin).parent / "include"
    source = "".join(f"#include <{shim}>\n" for shim in SHIMS)
    flags = [
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={OLDEST}",
        f"-I{include}",
        "-xc++",
        "-std=c++20",
        "-E",
        "-P",
        "-",
    ]
    return set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\s*\()", run("g++", *flags, input=source)))


def check_symbols(library: Path, known: set[str]) -> list[str]:
    symbols = undefined_symbols(library)
    demangled = run("c++filt", input="\n".join(symbols)).splitlines()
    inner = [d for d in demangled if re.match(r"(at|c10|torch)::", d)]
    problems = [f"{library.name} needs {d}, which no version of torch promises" for d in inner]
    called = {s for s in symbols if re.match(r"(aoti_)?torch_", s)}
    return problems + [f"{library.name} calls {s}, which torch 2.11 lacks" for s in sorted(called - known)]


def run_elsewhere(wheel: Path, torch: str, folder: Path) -> None:
    """Installs the wheel beside another torch and runs op tests there."""
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "-q", "install", f"torch=={torch}", "pytest", "numpy", wheel)
    tests = [str(ROOT / t) for t in OP_TESTS]
    print(
        run(python, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ROOT / "tests", *tests, cwd=folder)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch", action="append", default=[], help="also run the ops with this version")
    parser.add_argument("--wheel", type=Path, help="check this wheel instead of building one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = options.wheel or build_wheel(folder)
        problems = check_contents(wheel)
        zipfile.ZipFile(wheel).extractall(folder / "wheel")
        known = promised_functions()
        libraries = sorted((folder / "wheel" / "narrowcast").glob("*.so"))
        for library in libraries:
            problems += check_symbols(library, known)
        print("\n".join(problems) or f"{wheel.name}: {len(libraries)} libraries, nothing but the stable ABI")
        for torch in options.torch:
            run_elsewhere(wheel.resolve(), torch, folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
