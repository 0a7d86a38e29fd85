"""What the tests of norm on CPU and GPU share."""

import torch

from narrowcast.kernels.quantize import quantize_ref
from tolerances import assert_close


def operands(shape, dtype, parameter_dtype=torch.float32):
    x, residual = (torch.randn(shape) * 3 + 1).to(dtype), torch.randn(shape).to(dtype)
    return x, residual, *(torch.randn(shape[-1]).to(parameter_dtype) for _ in range(2))


def assert_quantised(q, scale, y, group_size):
    """q and scale are those of some float32 y within its rounding of the reference: at most one step off."""
    expected_q, expected_scale = quantize_ref.quantize_int8(y.float(), group_size)
    assert q.dtype == torch.int8 and scale.shape == expected_scale.shape
    assert_close(scale, expected_scale, 1e-5)
    off = (q.int() - expected_q.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.01
