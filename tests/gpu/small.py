"""A few small cases of every compiled kernel, for compute-sanitizer: python tests/gpu/small.py"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from device_cases import OPS, backends, cases, wrong

CASES, SEED = 6, 1


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a CUDA device, and torch sees none here")
        return 1
    compiled = [op for op in OPS.values() if "cuda" in backends(op.name)]
    bad = [
        what
        for op in compiled
        for a in cases(op, CASES, SEED, "cuda")
        if (what := wrong(op, a, "cuda", "cuda"))
    ]
    print("\n".join([*bad, f"{len(compiled)} ops, {len(bad)} cases wrong"]))
    return 1 if bad or not compiled else 0


if __name__ == "__main__":
    sys.exit(main())
