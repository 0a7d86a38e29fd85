"""What the tests of gated_act on CPU and GPU share."""

import torch

SHAPES = [(1, 1), (3, 7), (2, 3, 32), (5, 97), (17, 384), (1, 9001)]


FORMS = [("silu_mul", ()), ("gelu_mul", ("none",)), ("gelu_mul", ("tanh",))]


def operands(shape, dtype):
    return (torch.randn(shape) * 4).to(dtype), torch.randn(shape).to(dtype)
