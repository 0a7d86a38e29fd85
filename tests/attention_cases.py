"""Shapes and operands that the tests of attention and attention_int8 share."""

import torch

SHAPES = [  # B, Hq, Hkv, Sq, Sk, D, Dv
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 1, 7, 7, 17, 5),
    (1, 12, 12, 32, 32, 32, 32),
    (2, 6, 2, 65, 131, 64, 64),
    (1, 2, 2, 5, 300, 128, 96),
    (1, 4, 1, 67, 13, 40, 72),
]


def operands(b, hq, hkv, sq, sk, d, dv, dtype=torch.float32):
    make = lambda *s: torch.randn(*s).to(dtype)  # noqa: E731
    return make(b, hq, sq, d), make(b, hkv, sk, d), make(b, hkv, sk, dv)
