"""Mutation test of the CUDA kernels: each barrier and wait dropped, each index and constant off by one.

All mutants of a kernel are compiled at once, each behind ``mutant == number``; a run of the test program
with MUTANT=number is a run of that mutant. A mutant that no test notices is printed: either it changes
nothing that counts (the order of tiles), which survivors.py explains, or a test is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from emulator import build

SYNC = re.compile(r"ptx::(sync_threads|sync_warp|cp_async_commit)\(\);")
WAIT = re.compile(r"ptx::cp_async_wait<([^;]+)>\(\);")
INDEX = re.compile(r"(?<=[\w\]])\[([^\[\]{}]+)\]")
NUMBER = re.compile(r"(?<![\w.:<])(\d+)(?![\w.>]|\s*>)")
DECLARATION = re.compile(r"\b(?:float|u?int\d+_t|T::\w+)\s+(?:\(&)?\w+\)?(?:\[[^\[\]]*\])+")
#: Headers of kernels/common that rooms have their loops in: mutated with each room that includes them.
LOOPS = ("mma_tiles.cuh", "int8_operands.cuh")
#: Lines whose constants are no values at run time, or only shape the code.
STATIC = ("constexpr", "static_assert", "template", "#pragma", "__launch_bounds__", "//")


@dataclass
class Mutant:
    number: int
    line: int
    what: str


def device_code(source: str) -> list[bool]:
    """Per line: whether it is the body of a device function."""
    inside, depth, result = False, 0, []
    for line in source.splitlines():
        starts = not inside and ("__device__" in line or "__global__" in line)
        result.append(inside and depth > 0)
        if starts:
            inside = True
        if inside:
            depth += line.count("{") - line.count("}")
            if depth == 0 and "}" in line:
                inside = False
    return result


def mutate(source: str) -> tuple[str, list[Mutant]]:
    """The source with all mutants in it, and their list."""
    mutants: list[Mutant] = []

    def add(line: int, what: str) -> str:
        mutants.append(Mutant(len(mutants) + 1, line, what))
        return f"(mutant == {len(mutants)})"

    lines = []
    for number, (line, device) in enumerate(zip(source.splitlines(), device_code(source)), 1):
        code = line.split("//")[0]
        if not device or any(word in line.split("//")[0] for word in STATIC[:-1]):
            lines.append(line)
            continue

        def drop(match, number=number):
            return f"if (!{add(number, 'without ' + match[0])}) {match[0]}"

        def wait(match, number=number):
            early = add(number, f"waits for one copy less: {match[0]}")
            none = add(number, f"without {match[0]}")
            more = f"ptx::cp_async_wait<{match[1]} + 1>()"
            return f"if (!{none}) {early} ? {more} : ptx::cp_async_wait<{match[1]}>();"

        def index(match, number=number, code=code):
            if any(m.start() <= match.start() < m.end() for m in DECLARATION.finditer(code)):
                return match[0]
            return f"[{match[1]} + {add(number, f'index + 1: {match[0]} in: {code.strip()}')}]"

        def constant(match, number=number, code=code):
            return f"({match[1]} + {add(number, f'{match[1]} + 1 in: ' + code.strip())})"

        if SYNC.search(code) or WAIT.search(code):
            code = WAIT.sub(wait, SYNC.sub(drop, code))
        elif INDEX.search(code) and not DECLARATION.search(code):
            code = INDEX.sub(index, code)
        elif not DECLARATION.search(code):
            code = NUMBER.sub(constant, code)
        lines.append(code)
    head = '#include <cstdlib>\nstatic const int mutant = std::atoi(std::getenv("MUTANT"));\n'
    return head + "\n".join(lines) + "\n", mutants


def joined(kernels: list[Path]) -> str:
    """The kernel files as one, with the device headers of their rooms, and LOOPS, in place."""
    rooms, seen = {kernel.parent for kernel in kernels}, set()

    def inside(match: re.Match[str]) -> str:
        path = build.ROOT / "kernels" / match[1]
        if path.parent not in rooms and path.name not in LOOPS:
            return match[0]
        text = "" if path in seen else path.read_text().replace("#pragma once\n", "")
        seen.add(path)
        return expanded(text)

    def expanded(text: str) -> str:
        return re.sub(r'#include "(\w+/\w+\.cuh)"', inside, text)

    return "\n".join(expanded(kernel.read_text()) for kernel in kernels)


def caught(program: Path, mutant: int) -> bool:
    try:
        done = subprocess.run(
            [program, "quick"],
            env={**os.environ, "MUTANT": str(mutant)},
            capture_output=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return True  # it loops: a watchdog of any kind sees that
    return done.returncode != 0


def run(name: str) -> tuple[int, list[Mutant]]:
    """Number of mutants of the room ``name``, and those that no test noticed."""
    source, mutants = mutate(joined([build.ROOT / "kernels" / kernel for kernel in build.PROGRAMS[name][0]]))
    build.BUILD.mkdir(parents=True, exist_ok=True)
    path = build.BUILD / f"{name}_mutants.cpp"
    path.write_text(source)
    program = build.build(name, [path])
    assert not caught(program, 0), "the unchanged kernel must pass"
    with ThreadPoolExecutor(2) as pool:
        noticed = list(pool.map(lambda mutant: caught(program, mutant.number), mutants))
    return len(mutants), [mutant for mutant, seen in zip(mutants, noticed) if not seen]
