"""What the tests of dequantize on CPU and GPU share."""

import torch

from narrowcast.formats import GGUF_BLOCKS


def group_inputs(n, k, group, bits, scale_dtype, with_offset):
    packed = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
    scale = torch.randn(n, k // group).to(scale_dtype)
    offset = torch.randn(n, k // group).to(scale_dtype) if with_offset else None
    return packed, scale, offset, group, bits


# Where a block keeps its float16 scales; the rest may be any byte.
SCALES_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(type, *lead, special=None):
    size = GGUF_BLOCKS[type][1]
    blocks = torch.randint(0, 256, (*lead, size), dtype=torch.uint8)
    if type in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type]
        blocks = torch.randn(*lead, 1).to(dtype).view(torch.uint8)
    for at in SCALES_AT.get(type, ()):
        scale = torch.randn(*lead, 1) * 0.1 if special is None else torch.full((*lead, 1), special)
        blocks[..., at : at + 2] = scale.half().view(torch.uint8)
    return blocks.flatten(-2)


def same_bits(a, b):
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))
