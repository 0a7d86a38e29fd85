"""llama.cpp's own quantiser, from the GGUF file's weights in float32 and back into its formats.

Q4_1 is left out: the file's weights lie on its grid, so that it would reproduce them for nothing.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from . import Engine, Stopwatch, Task, Unsupported


def recipes(kind: str, task: Task) -> dict[str, Callable[[], Engine]]:
    if kind != "decoder":
        raise Unsupported("it runs language models")
    import llama_cpp

    folder = tempfile.TemporaryDirectory()

    def quantise(source: Path, name: str) -> Path:
        out = Path(folder.name) / f"{name}.gguf"
        options = llama_cpp.llama_model_quantize_default_params()
        options.nthread, options.allow_requantize = task.threads, True
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{name}")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)):
            raise Unsupported(f"llama_model_quantize to {name} failed")
        return out

    @cache
    def source() -> Path:
        return quantise(task.path, "ALL_F32")

    def make(name: str) -> Engine:
        original, clock = source(), Stopwatch()
        path = quantise(original, f"MOSTLY_{name}")
        spent = clock.read()
        llama = llama_cpp.Llama(
            str(path), n_ctx=1024, n_batch=512, n_threads=task.threads, n_threads_batch=task.threads,
            logits_all=True, verbose=False,
        )  # fmt: skip

        def prepare(ids: torch.Tensor):
            tokens = ids[0].tolist()

            def call() -> torch.Tensor:
                llama.reset()
                llama.eval(tokens)
                return torch.from_numpy(llama.scores[: len(tokens)].copy())[None]

            return call

        return Engine(f"llama_cpp {name}", prepare, bytes=path.stat().st_size, **spent)

    return {name: (lambda name=name: make(name)) for name in ("Q8_0", "Q4_0", "Q4_K_M")}
