"""What the tests of kv_append on CPU and GPU share."""

import torch


def operands(b, h, s, c, d, cache=torch.float32, dtype=torch.float32):
    k, v = torch.randn(b, h, s, d).to(dtype), torch.randn(b, h, s, d).to(dtype)
    start = torch.randint(0, c - s + 1, (b,), dtype=torch.int32)
    if cache == torch.uint8:
        caches = [torch.ones(b, h, c, d // 2, dtype=cache) for _ in "kv"]
        grids = [torch.ones(b, h, c, d // 16, dtype=torch.bfloat16) for _ in "kv"]
        return [*caches, k, v, start, *grids]
    caches = [torch.ones(b, h, c, d).to(cache) for _ in "kv"]
    scales = [torch.ones(b, h, c) for _ in "kv"] if cache == torch.int8 else [None, None]
    return [*caches, k, v, start, *scales]


def tables(positions, half):
    angles = torch.rand(positions, half) * 6
    return angles.cos(), angles.sin()
