"""What the tests of conv2d on CPU and GPU share."""

import torch


def operands(case, dtype):
    shape, outputs, groups, kernel, *_ = case
    depth = shape[1] // groups * kernel[0] * kernel[1]
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    return x, (torch.randn(outputs, shape[1] // groups, *kernel) / depth**0.5).to(dtype)


def window(case):
    return {"stride": case[4], "padding": case[5], "dilation": case[6], "groups": case[2]}
