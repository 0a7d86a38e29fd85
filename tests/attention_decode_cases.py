"""What the tests of attention_decode on CPU and GPU share."""

import torch


def pages_of(tensor, table, page):
    """A dense cache [B, H, C, ...] laid out in the pages that `table` names."""
    h, c = tensor.shape[1:3]
    pages = tensor.new_zeros((int(table.max()) + 1, h, page, *tensor.shape[3:]))
    pages[table.flatten().long()] = tensor.unflatten(2, (c // page, page)).transpose(1, 2).flatten(0, 1)
    return pages


def operands(b, hq, hkv, sq, c, d, cache=torch.float32, dtype=torch.float32, lengths=None):
    """q, k_cache, v_cache, lengths, k_scale, v_scale; what lies past a length is NaN or nonsense."""
    q = torch.randn(b, hq, sq, d).to(dtype)
    lengths = torch.randint(sq, c + 1, (b,)) if lengths is None else torch.tensor(lengths)
    lengths = lengths.to(torch.int32)
    if cache == torch.uint8:  # rotated 4-bit codes; grids past a length are NaN
        codes = [torch.randint(0, 256, (b, hkv, c, d // 2), dtype=torch.uint8) for _ in "kv"]
        grids = [torch.randn(b, hkv, c, d // 16).mul(0.2).bfloat16() for _ in "kv"]
        for i, n in enumerate(lengths.tolist()):
            grids[0][i, :, n:] = grids[1][i, :, n:] = torch.nan
        return q, *codes, lengths, *grids
    if cache == torch.int8:
        k, v = (torch.randint(-128, 128, (b, hkv, c, d), dtype=torch.int8) for _ in "kv")
        return q, k, v, lengths, torch.rand(b, hkv, c) / 64, torch.rand(b, hkv, c) / 64
    k, v = (torch.randn(b, hkv, c, d).to(cache) for _ in "kv")
    for i, n in enumerate(lengths.tolist()):
        k[i, :, n:] = v[i, :, n:] = torch.nan
    return q, k, v, lengths, None, None
