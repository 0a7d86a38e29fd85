"""What the tests of pool on CPU and GPU share."""

import torch

DTYPES = [torch.uint8, torch.int8]


WINDOWS = [  # kernel, stride, padding, dilation, ceil
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((3, 2), (1, 3), (1, 0), (1, 1), True),
    ((2, 3), (2, 2), (0, 1), (2, 3), True),
    ((1, 1), (1, 1), (0, 0), (1, 1), False),
    ((7, 5), (1, 1), (3, 2), (1, 1), False),
]
