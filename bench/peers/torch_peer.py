"""torch itself: float32, bfloat16, and compiled where that works."""

from __future__ import annotations

import copy

import torch
from torch import nn

from . import Engine, Task


def _variants(task: Task, prepare) -> list[Engine]:
    half = copy.deepcopy(task.module).to(torch.bfloat16)
    size = sum(p.nbytes for p in task.module.parameters())
    return [
        Engine("torch fp32", lambda *i: prepare(task.module, *i), bytes=size),
        Engine("torch bf16", lambda *i: prepare(half, *i), bytes=size // 2),
        Engine(
            "torch compile", lambda *i: prepare(torch.compile(copy.deepcopy(task.module)), *i), bytes=size
        ),
    ]


def encoder(task: Task) -> list[Engine]:
    def prepare(module: nn.Module, ids, mask):
        return lambda: module(ids, mask)

    return _variants(task, prepare)


def image(task: Task) -> list[Engine]:
    def prepare(module: nn.Module, pixels):
        dtype = next(module.parameters()).dtype
        pixels = pixels.to(dtype).contiguous(memory_format=torch.channels_last)
        return lambda: module(pixels)

    return _variants(task, prepare)


def decoder(task: Task) -> list[Engine]:
    """prepare(ids, ahead): a prefill of ids, or with ``ahead`` tokens in the cache one step for ids [B, 1]."""

    def prepare(module: nn.Module, ids, ahead: int):
        if not ahead:
            return lambda: module(ids, logits_to_keep=1).logits
        prompt = torch.arange(ahead).remainder(1000)[None].repeat(len(ids), 1) + 100
        cache = module(prompt, use_cache=True, logits_to_keep=1).past_key_values

        def step():
            logits = module(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            cache.crop(-1)
            return logits

        return step

    return _variants(task, prepare)[:2]
