"""ResNet-50 in plain torch with weights from a seed, for speed: no package here brings trained ones.

He et al., "Deep Residual Learning for Image Recognition", 2015, with the stride in the 3x3 convolution as everybody
has it since.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.reduce, self.spatial = conv(inputs, width, 1), conv(width, width, 3, stride)
        self.expand = conv(width, outputs, 1)
        self.shortcut = conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial(self.reduce(x).relu()).relu()
        return (self.expand(y) + self.shortcut(x)).relu()


class ResNet50(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 64, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, inputs = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.stem(x).relu()))
        return self.classifier(x.mean((2, 3)))


def resnet50(pictures: Tensor, seed: int = 0) -> ResNet50:
    """With batch statistics of ``pictures`` [N, 3, 224, 224], so that every layer's values have a size as in use."""
    torch.manual_seed(seed)
    model = ResNet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in pictures.split(16):
            model(batch)
    return model.eval().requires_grad_(False)
