"""llama.cpp through its Python bindings, on the same GGUF file."""

from __future__ import annotations

import torch

from . import Engine, Task


def decoder(task: Task) -> list[Engine]:
    import llama_cpp

    engines = []
    for flash in (False, True):
        llama = llama_cpp.Llama(
            str(task.path), n_ctx=2048, n_batch=512, n_threads=task.threads, n_threads_batch=task.threads,
            flash_attn=flash, verbose=False,
        )  # fmt: skip

        def prepare(ids: torch.Tensor, ahead: int, llama=llama):
            if len(ids) > 1:
                raise NotImplementedError("its Python bindings decode one sequence")
            tokens = ids[0].tolist()
            prompt = (torch.arange(ahead).remainder(1000) + 100).tolist()

            def call():
                # eval() drops what the cache holds behind n_tokens.
                if ahead and llama.n_tokens < ahead:
                    llama.reset()
                    llama.eval(prompt)
                llama.n_tokens = ahead
                llama.eval(tokens)

            llama.reset()
            return call

        name = f"llama.cpp {task.path.stem.rpartition('.')[2]}{' flash' if flash else ''}"
        engines.append(Engine(name, prepare, bytes=task.path.stat().st_size))
    return engines
