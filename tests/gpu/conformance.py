"""Whether the instructions of common/ptx.cuh do on this GPU what the emulator says: python tests/gpu/conformance.py

One source, conformance.cu, is built twice: by g++ with the emulator, and by nvcc. Both get the same seeded words;
results are compared element by element. Integers, moves and conversions must agree bit for bit (any NaN equals any
NaN); the sums of floating-point mma within ``MMA_BOUND`` of |d| + sum |a b|, since the hardware's order of
additions is not specified.

--seed N    the inputs (1 by default)
--arch A    what nvcc compiles for, such as sm_90 (that of the first GPU by default)
--json P    write a row per case
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from emulator import build  # noqa: E402

SOURCE = ROOT / "tests/gpu/conformance.cu"
BLOCKS = 64
SEED = 1
#: Tensor cores align the products of a step to the largest and cut off what is below float32's last bit: two steps of
#: at most 8 products and the sum so far, each short by at most 2^-23 of the largest, and each result cut once more.
MMA_BOUND = 20 * 2.0**-23

Words = np.ndarray
Random = np.random.Generator


@dataclass(frozen=True)
class Case:
    """inputs, outputs: words per block. draw(random) -> [BLOCKS, inputs]. compare: how a result is judged."""

    inputs: int
    outputs: int
    draw: Callable[[Random, int], Words]
    compare: str = "bits"


def any_words(random: Random, count: int) -> Words:
    return random.integers(0, 2**32, (BLOCKS, count), dtype=np.uint32)


#: Zeros, subnormals, the largest, infinities, NaN, and neighbours of rounding boundaries.
SPECIAL_FLOATS = np.array(
    [
        0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
        0x7FC00000, 0xFFC12345, 0x33000000, 0x33000001, 0x33C00000, 0x387FC000, 0x387FE000, 0x38800000, 0x477FE000,
        0x477FEFFF, 0x477FF000, 0x3F801000, 0x3F803000, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000,
    ],
    dtype=np.uint32,
)  # fmt: skip
SPECIAL_HALVES = {
    "f16": (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00),
    "bf16": (0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0),
}


def floats(random: Random, count: int) -> Words:
    """A third any bits, a third of the range of float16, a third special."""
    shape = (BLOCKS, count)
    scaled = random.standard_normal(shape) * 2.0 ** random.integers(-26, 18, shape)
    choices = [
        any_words(random, count),
        scaled.astype(np.float32).view(np.uint32),
        random.choice(SPECIAL_FLOATS, shape),
    ]
    return np.choose(random.integers(0, 3, shape), choices)


def halves(kind: str) -> Callable[[Random, int], Words]:
    """Pairs of them: any bits, values near 1, special ones."""

    def draw(random: Random, count: int) -> Words:
        shape = (BLOCKS, count * 2)
        near = (random.standard_normal(shape) * 2.0 ** random.integers(-4, 5, shape)).astype(np.float32)
        near = near.astype(np.float16).view(np.uint16) if kind == "f16" else near.view(np.uint32) >> 16
        choices = [
            random.integers(0, 2**16, shape),
            near.astype(np.int64),
            random.choice(SPECIAL_HALVES[kind], shape),
        ]
        return np.choose(random.integers(0, 3, shape), choices).astype(np.uint16).view(np.uint32)

    return draw


def mma_floats(kind: str) -> Callable[[Random, int], Words]:
    """Per lane 6 words of finite pairs and 4 floats; exponents are spread further in later blocks."""

    def draw(random: Random, count: int) -> Words:
        spread = np.linspace(0, 6, BLOCKS)[:, None, None]
        values = random.standard_normal((BLOCKS, 32, 16))
        values *= 2.0 ** np.round(spread * random.uniform(-1, 1, values.shape))
        pairs = values[:, :, :12].astype(np.float32)
        pairs = pairs.astype(np.float16).view(np.uint16) if kind == "f16" else pairs.view(np.uint32) >> 16
        words = np.ascontiguousarray(pairs.astype(np.uint16)).view(np.uint32)
        sums = np.ascontiguousarray(values[:, :, 12:].astype(np.float32)).view(np.uint32)
        return np.concatenate([words, sums], axis=2).reshape(BLOCKS, count)

    return draw


CASES = {
    "shuffle_xor": Case(32, 192, any_words),
    "shuffle": Case(64, 32, any_words),
    "global_moves": Case(128, 192, any_words),
    "shared_moves": Case(128, 128, any_words),
    "cp_async": Case(288, 256, any_words),
    "ldmatrix_x4": Case(160, 128, any_words),
    "ldmatrix_x4_trans": Case(160, 128, any_words),
    "mma_s8_s8": Case(320, 128, any_words),
    "mma_u8_s8": Case(320, 128, any_words),
    "mma_f16": Case(320, 128, mma_floats("f16"), "mma_f16"),
    "mma_bf16": Case(320, 128, mma_floats("bf16"), "mma_bf16"),
    "dp4a": Case(96, 32, any_words),
    "permute_bytes": Case(96, 32, any_words),
    "fma_f16x2": Case(96, 32, halves("f16"), "f16"),
    "fma_bf16x2": Case(96, 32, halves("bf16"), "bf16"),
    "atomic_add": Case(64, 8, any_words),
    "to_float16": Case(64, 64, floats, "f16"),
    "to_bfloat16": Case(64, 64, floats, "bf16"),
    "from_float16": Case(32, 64, halves("f16"), "f32"),
    "from_bfloat16": Case(32, 64, halves("bf16"), "f32"),
}


def inputs(seed: int) -> dict[str, Words]:
    """Case -> uint32 [BLOCKS, inputs]."""
    drawn = {}
    for number, (name, case) in enumerate(CASES.items()):
        drawn[name] = case.draw(np.random.default_rng([seed, number]), case.inputs).astype(np.uint32)
    return drawn


def run(program: Path, given: dict[str, Words]) -> dict[str, Words]:
    """Case -> what the program computes, uint32 [BLOCKS, outputs]. Raises RuntimeError with what it says."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        source.write_bytes(b"".join(given[name].tobytes() for name in CASES))
        done = subprocess.run([program, source, target], capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{program.name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        words = np.frombuffer(target.read_bytes(), np.uint32)
    sizes = [BLOCKS * case.outputs for case in CASES.values()]
    if words.size != sum(sizes):
        raise RuntimeError(f"{program.name} must write {sum(sizes)} words, got {words.size}")
    parts = np.split(words, np.cumsum(sizes)[:-1])
    return {name: part.reshape(BLOCKS, -1) for name, part in zip(CASES, parts, strict=True)}


def half_values(words: Words, kind: str) -> np.ndarray:
    """Both 16-bit floats of each word, as float64 [..., 2 x words]."""
    bits = np.ascontiguousarray(words).view(np.uint16)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def operands(words: Words, elements: Callable[[Words], np.ndarray]) -> tuple[np.ndarray, np.ndarray, Words]:
    """a [BLOCKS, 16, K], b [BLOCKS, K, 8] and the words of d [BLOCKS, 16, 8] of lanes that hold 4, 2 and 4 words.

    ``elements`` takes words [..., n] to [..., n, elements per word]. Layout: the PTX ISA's fragments of m16n8k16 and
    m16n8k32.
    """
    lanes = words.reshape(BLOCKS, 8, 4, 10)  # group, quad
    a, b, d = elements(lanes[..., :4]), elements(lanes[..., 4:6]), lanes[..., 6:]
    # word i of a: row group + 8 (i % 2), half i // 2 of k
    a = a.reshape(BLOCKS, 8, 4, 2, 2, -1).transpose(0, 4, 1, 3, 2, 5).reshape(BLOCKS, 16, -1)
    b = b.transpose(0, 3, 2, 4, 1).reshape(BLOCKS, -1, 8)
    return a, b, fragment_matrix(d)


def fragment_matrix(d: np.ndarray) -> np.ndarray:
    """[BLOCKS, 16, 8] of what the lanes hold as d, [BLOCKS, 32 lanes x 4] in any shape."""
    d = d.reshape(BLOCKS, 8, 4, 2, 2)  # group, quad, row half, column of two
    return d.transpose(0, 3, 1, 2, 4).reshape(BLOCKS, 16, 8)


def pairs_of(kind: str) -> Callable[[Words], np.ndarray]:
    return lambda words: half_values(words, kind).reshape(*words.shape, 2)


def magnitudes(given: Words, kind: str) -> np.ndarray:
    """|d| + sum |a b| of every sum of an mma, [BLOCKS, 16, 8]."""
    a, b, d = operands(given, pairs_of(kind))
    return np.abs(np.ascontiguousarray(d).view(np.float32)) + np.abs(a) @ np.abs(b)


def differences(name: str, given: Words, wanted: Words, got: Words) -> tuple[int, float]:
    """How many elements of a case differ, and the largest error of an mma relative to |d| + sum |a b|."""
    kind = CASES[name].compare
    if kind.startswith("mma"):
        floats_of = lambda words: fragment_matrix(np.ascontiguousarray(words).view(np.float32))  # noqa: E731
        error = np.abs(floats_of(got).astype(np.float64) - floats_of(wanted))
        relative = error / magnitudes(given, kind.removeprefix("mma_"))
        return int((~(relative <= MMA_BOUND)).sum()), float(np.nan_to_num(relative, nan=np.inf).max())
    if kind == "bits":
        return int((wanted != got).sum()), 0.0
    wanted, got = np.ascontiguousarray(wanted), np.ascontiguousarray(got)
    if kind == "f32":
        values = [w.view(np.float32) for w in (wanted, got)]
        bits = wanted != got
    else:
        values = [half_values(w, kind) for w in (wanted, got)]
        bits = wanted.view(np.uint16) != got.view(np.uint16)
    both_nan = np.isnan(values[0]) & np.isnan(values[1])
    return int((bits & ~both_nan).sum()), 0.0


def source_hash() -> str:
    files = [SOURCE, ROOT / "kernels/common/ptx.cuh", ROOT / "kernels/common/launch.h"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def nvcc() -> str:
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("nvcc") or str(folder / "nvcc")


def compile_for(arch: str, target: Path, compiler: str | None = None) -> Path:
    """The program for GPUs. Raises CalledProcessError, with the compiler's words in its stderr."""
    command = [compiler or nvcc(), "-std=c++20", "-O2", f"-arch={arch}", "--fmad=false"]
    command += [f"-I{ROOT / 'kernels'}", "-o", str(target), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def gpu_facts() -> dict[str, str]:
    command = ["nvidia-smi", "--query-gpu=name,uuid,compute_cap", "--format=csv,noheader", "--id=0"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name, uuid, capability = (part.strip() for part in text.strip().split(","))
    return {"device": name, "uuid": uuid, "arch": f"sm_{capability.replace('.', '')}"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--arch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = gpu_facts()
    given = inputs(options.seed)
    wanted = run(build.build_source(SOURCE), given)
    with tempfile.TemporaryDirectory() as folder:
        program = compile_for(options.arch or facts["arch"], Path(folder) / "conformance")
        got = run(program, given)
    rows = []
    for name in CASES:
        differ, worst = differences(name, given[name], wanted[name], got[name])
        bound = (
            f", at most {worst:.1e} of {MMA_BOUND:.1e} allowed" if name.startswith(("mma_f", "mma_b")) else ""
        )
        print(f"{'FAILED' if differ else 'agrees':8}{name:20}{differ} of {wanted[name].size} differ{bound}")
        row = {"room": "conformance", "case": name, "elements": wanted[name].size, "differ": differ}
        rows.append({**row, "worst": worst, "seed": options.seed, "sources": source_hash(), **facts})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = sum(row["differ"] > 0 for row in rows)
    print(f"{len(rows)} cases, {failed} differ from the emulator on {facts['device']}, seed {options.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
        print(getattr(error, "stderr", None) or error)
        sys.exit(1)
