"""The rules that keep the house in order: which way dependencies point, and what a kernel file may include."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "narrowcast"
KERNELS = ROOT / "kernels"

#: A layer may import itself and what stands below it.
LAYERS = ["kernels", "ops", "graph", "importers", "exporters", "runtime", "compress", "cli"]
ALLOWED = {
    "kernels": set(),
    "ops": {"kernels"},
    "graph": {"ops", "kernels"},
    "importers": {"graph", "ops", "kernels"},
    "exporters": {"graph", "ops", "kernels"},
    "runtime": {"importers", "graph", "ops", "kernels"},
    "compress": {"runtime", "importers", "graph", "ops", "kernels"},
    "cli": {"compress", "runtime", "importers", "graph", "ops", "kernels"},
}


def layer(module: str) -> str | None:
    """The layer of a module such as ``narrowcast.graph.ir``; the package's own files are the layer ops."""
    if module.split(".")[0] == "narrowcast_cli":
        return "cli"
    if module.split(".")[0] != "narrowcast":
        return None
    part = (module.split(".") + [""])[1]
    return part if part in LAYERS else "ops"


def imports(path: Path, module: str):
    """Names of the modules that a file imports when it is itself imported (not inside functions)."""
    tree = ast.parse(path.read_text())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def python_files():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        yield path, ".".join(relative.parts).removesuffix(".__init__")
    for path in sorted(KERNELS.rglob("*.py")):
        relative = path.relative_to(KERNELS).with_suffix("")
        yield path, ".".join(("narrowcast", "kernels", *relative.parts)).removesuffix(".__init__")


@pytest.mark.parametrize("path, module", list(python_files()), ids=lambda x: x if isinstance(x, str) else "")
def test_dependencies_point_one_way(path, module):
    here = layer(module)
    for name in imports(path, module):
        there = layer(name)
        if there in (None, here) or (here == "kernels" and name in ("narrowcast", "narrowcast.errors")):
            continue
        if here == "ops":  # the package's front door exports what the upper layers offer, lazily
            assert there in ALLOWED["ops"], f"{module} imports {name}"
        elif there == "ops" and here == "kernels":
            pytest.fail(f"{module} imports {name}: kernels know nothing of the package above them")
        else:
            assert there in ALLOWED[here], f"{module} ({here}) imports {name} ({there})"


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


CPP = sorted(p for suffix in ("cpp", "h", "cu", "cuh") for p in KERNELS.rglob(f"*.{suffix}"))
ISA_SUFFIXES = ("_generic", "_avx2", "_avx512", "_avx512bf16", "_amx")
C_HEADERS = {"immintrin.h", "cstdint", "cstring", "cmath", "string.h", "stdint.h", "math.h", "cstddef"}


@pytest.mark.parametrize("path", CPP, ids=lambda p: str(p.relative_to(KERNELS)))
def test_includes(path):
    stem = path.stem
    for name in included(path):
        if name.startswith(("torch/", "ATen/", "c10/")):
            doors = ("stable.h", "stable_cuda.h", "parallel_cpu.cpp")
            only_door = path.parent == KERNELS / "common" and path.name in doors
            assert only_door and name.startswith("torch/csrc/stable/"), f"includes {name}"
        if name in ("common/stable.h", "common/stable_cuda.h"):
            stops = stem.endswith(("_cpu", "_cuda", "_checks")) and path.name != f"{path.parent.name}_cuda.h"
            assert path.parent.name == "common" or stops or stem == "library", (
                "tensors stop in <op>_cpu.cpp and <op>_cuda.cu"
            )
        assert "python" not in name and "runtime" not in name, "kernels know nothing of the graph"
    if path.suffix == ".cpp" and stem.endswith(ISA_SUFFIXES[1:]):
        # Inline code of a shared header, compiled for a new CPU, could be the copy the linker keeps.
        for name in included(path):
            own = "/" in name
            assert own or name in C_HEADERS, f"an ISA file may not include <{name}>"


def test_schemas_live_in_the_catalogue():
    for path in CPP:
        if path.name != "library.cpp":
            assert "m.def(" not in path.read_text(), (
                f"{path.name} defines a schema; they belong to library.cpp"
            )


def test_every_kernel_list_line_has_its_file():
    for path in KERNELS.rglob("*.inc"):
        for name in re.findall(r"^KERNEL\((\w+)", path.read_text(), re.M):
            suffixes = [s for s in ISA_SUFFIXES if name.endswith(s[1:])]
            assert suffixes, f"{path.name}: kernel {name} names no instruction set"


def test_import_is_light():
    """No importer, compressor or third-party model library comes in with ``import narrowcast``."""
    code = (
        "import sys, narrowcast; "
        "print([m for m in ('transformers', 'onnx', 'matplotlib', 'triton', 'rich', 'typer', 'tokenizers', "
        "'narrowcast.compress', 'narrowcast.importers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_command_line_help_needs_no_torch():
    code = (
        "import sys, narrowcast_cli; sys.argv = ['narrowcast', '--help']\n"
        "try: narrowcast_cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "compress" in result.stdout and "verify" in result.stdout


@pytest.mark.parametrize("library", ["libnarrowcast_cpu.so"])
def test_only_stable_symbols_of_torch(library):
    """No C++ symbol of ATen, c10 or torch is needed: the library serves every torch from 2.11 on."""
    import narrowcast
    from narrowcast._load import library_path

    path = library_path(library, narrowcast.__path__)
    result = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", path], capture_output=True, text=True, check=True
    )
    foreign = [line for line in result.stdout.splitlines() if re.search(r"\b(at|c10|torch)::", line)]
    assert not foreign
