"""What the tests of linear_grouped on CPU and GPU share."""

import torch


def weight(n, k, group, bits, with_offset=True, scale_dtype=torch.float32):
    packed = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
    size = 0.1 if bits == 4 else 0.01
    scale = (torch.randn(n, k // group) * size).to(scale_dtype)
    offset = (torch.randn(n, k // group) * size * 3).to(scale_dtype) if with_offset else None
    return packed, scale, offset, group, bits
