"""Builds the emulator's test programs with g++: kernel sources as they are, every load and store watched.

A program is ``tests/emulator/test_<name>.cpp`` with the kernels and CPU references that it compares. What
is built stays in ``build/emulator`` and is reused while no source changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"

#: Program -> kernels (watched) and references (plain), relative to kernels/.
PROGRAMS = {
    "emulator": ((), ()),
    "quantize": (("quantize/quantize_sm80.cu",), ("quantize/quantize_generic.cpp",)),
    "linear_int8": (
        ("linear_int8/linear_int8_sm80.cu",),
        ("linear_int8/linear_int8_generic.cpp", "common/activation.cpp"),
    ),
    "linear_grouped": (("linear_grouped/linear_grouped_sm80.cu",), ("common/activation.cpp",)),
    "attention": (
        (
            "attention/attention_sm80.cu",
            "attention_int8/attention_int8_sm80.cu",
            "attention_decode/attention_decode_sm80.cu",
        ),
        (),
    ),
    "conv2d_int8": (
        ("conv2d_int8/conv2d_int8_sm80.cu",),
        ("conv2d_int8/conv2d_int8_generic.cpp", "common/activation.cpp"),
    ),
    "norm": (("norm/norm_sm80.cu",), ()),
}
MACHINE = ("simt.cpp", "memory.cpp", "hooks.cpp", "ptx_host.cpp")

FLAGS = [
    *("-std=c++20", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *(f"-I{ROOT / folder}" for folder in ("kernels", "tests", "tests/emulator")),
]
#: -fsanitize=thread makes g++ call a hook at every access (hooks.cpp); its own library is not linked.
WATCHED = ["-O1", "-fsanitize=thread,undefined", "-fno-sanitize-recover=undefined"]


COMPILER = os.environ.get("CXX", "g++")


def _key() -> str:
    """Of everything that a program may include."""
    digest = hashlib.sha256()
    files = [p for d in ("kernels", "tests/emulator", "tests/gpu") for p in (ROOT / d).rglob("*")]
    for path in sorted(files):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".py", ".inc"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_object(folder: Path, source: Path, watched: bool, fresh: bool = False) -> Path:
    """One object file; a .cu file is C++ here. ``fresh``: whatever is there."""
    target = folder / f"{source.stem}{'.watched' if watched else ''}.o"
    if fresh or not target.exists():
        partial = target.with_suffix(".partial")
        flags = WATCHED if watched else ["-O2"]
        command = [COMPILER, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", partial]
        subprocess.run([str(part) for part in command], check=True)
        partial.rename(target)
    return target


def link(objects: list[Path], target: Path) -> Path:
    subprocess.run([COMPILER, "-fsanitize=undefined", *map(str, objects), "-o", str(target)], check=True)
    return target


def _folder() -> Path:
    """Of what is built from these sources; that of others is removed."""
    folder = BUILD / _key()
    folder.mkdir(parents=True, exist_ok=True)
    for old in BUILD.iterdir():
        if old != folder and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _objects(folder: Path, jobs: list[tuple]) -> list[Path]:
    """Of the emulator, and of these arguments of compile_object."""
    jobs = [(ROOT / "tests" / "emulator" / source, False) for source in MACHINE] + jobs
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: compile_object(folder, *job), jobs))


def build(name: str, kernels: list[Path] | None = None) -> Path:
    """The path of the program ``name``; ``kernels`` replaces its kernel sources (the mutation test)."""
    folder = _folder()
    watched, plain = PROGRAMS[name]
    replaced = kernels is not None
    jobs: list[tuple] = [(ROOT / "kernels" / source, False) for source in plain]
    jobs += [(ROOT / "tests" / "emulator" / f"test_{name}.cpp", name == "emulator")]
    jobs += [(path, True, replaced) for path in kernels or [ROOT / "kernels" / source for source in watched]]
    objects = _objects(folder, jobs)
    target = folder / f"{name}{'_replaced' if replaced else ''}"
    return link(objects, target) if replaced or not target.exists() else target


def build_source(source: Path) -> Path:
    """The path of a program that is one watched source, kernels and ``main`` in it."""
    folder = _folder()
    objects, target = _objects(folder, [(source, True)]), folder / source.stem
    return target if target.exists() else link(objects, target)
