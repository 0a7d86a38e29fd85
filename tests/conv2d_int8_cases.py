"""What the tests of conv2d_int8 on CPU and GPU share."""

import torch

CL = torch.channels_last


def pair(x):
    return x if isinstance(x, tuple) else (x, x)


def problem(case, dtype=torch.uint8, **extra):
    """Keyword arguments of the op for a random layer."""
    n, c, o, h, w, kernel, stride, padding, dilation, groups = case
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    x = torch.randint(low, high, (n, c, h, w), dtype=dtype).contiguous(memory_format=CL)
    return {
        "x_q": x,
        "x_scale": 0.02,
        "x_zero_point": 7,
        "w_q": torch.randint(-128, 128, (o, c // groups, *kernel), dtype=torch.int8),
        "w_scale": torch.randn(o) * 0.01,
        "bias": torch.randn(o),
        "stride": pair(stride),
        "padding": pair(padding),
        "dilation": pair(dilation),
        "groups": groups,
        **extra,
    }
