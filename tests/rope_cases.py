"""What the tests of rope on CPU and GPU share."""

import torch


def operands(b, h, s, d, rotated, dtype=torch.float32, table_dtype=torch.float32, rows=50):
    angle = torch.rand(rows, rotated // 2) * 6
    return torch.randn(b, h, s, d).to(dtype), angle.cos().to(table_dtype), angle.sin().to(table_dtype)
