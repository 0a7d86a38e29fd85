"""The convolutions of EfficientNet-Lite0 at 224 x 224, and some of ResNet-50, for the conv benches."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from narrowcast.runtime import Executor

_BLOCKS = [  # expansion, kernel, stride, channels in, out, repeats
    (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
]  # fmt: skip


class Layer(NamedTuple):
    channels: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    size: int  # height and width of the input
    activation: str

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def macs(self, batch: int) -> int:
        per_output = self.channels // self.groups * self.kernel**2
        return batch * self.out_size**2 * self.outputs * per_output

    def bytes(self, batch: int, element: int) -> int:
        images = batch * (self.channels * self.size**2 + self.outputs * self.out_size**2)
        return element * (images + self.outputs * self.channels // self.groups * self.kernel**2)

    def __str__(self) -> str:
        kind = "depthwise" if self.groups > 1 else f"{self.kernel}x{self.kernel}"
        taps = f" {self.kernel}x{self.kernel}" if self.groups > 1 else ""
        return f"{kind}{taps} s{self.stride} {self.channels}->{self.outputs} @{self.size}"


def efficientnet_lite0() -> Counter[Layer]:
    """Every distinct convolution, with how often the network has it."""
    layers = Counter([Layer(3, 32, 3, 2, 1, 224, "relu6")])
    size = 112
    for expansion, kernel, stride, before, after, repeats in _BLOCKS:
        for i in range(repeats):
            channels, step = (before, stride) if i == 0 else (after, 1)
            wide = channels * expansion
            if expansion > 1:
                layers[Layer(channels, wide, 1, 1, 1, size, "relu6")] += 1
            depthwise = Layer(wide, wide, kernel, step, wide, size, "relu6")
            layers[depthwise] += 1
            size = depthwise.out_size
            layers[Layer(wide, after, 1, 1, 1, size, "none")] += 1
    layers[Layer(320, 1280, 1, 1, 1, size, "relu6")] += 1
    return layers


RESNET50 = [
    Layer(3, 64, 7, 2, 1, 224, "relu"), Layer(64, 256, 1, 1, 1, 56, "none"),
    Layer(64, 64, 3, 1, 1, 56, "relu"),
    Layer(256, 64, 1, 1, 1, 56, "relu"), Layer(256, 256, 3, 1, 1, 14, "relu"),
    Layer(1024, 256, 1, 1, 1, 14, "relu"), Layer(512, 512, 3, 1, 1, 7, "relu"),
]  # fmt: skip


class _OneLayer(torch.nn.Module):
    def __init__(self, op, weights: dict, options: dict):
        super().__init__()
        self.op, self.names, self.options = op, list(weights), options
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, pixels):  # [N, H, W, C]: an executor's inputs are contiguous
        x = pixels.permute(0, 3, 1, 2)
        return self.op(x, **{n: getattr(self, n) for n in self.names}, **self.options)


def as_step(op, x: torch.Tensor, weights: dict, options: dict):
    """A call that runs the layer on a channels-last x as a plan does: one step of the executor's loop,
    weights packed before. Returns the call and its result.
    """
    pixels = x.permute(0, 2, 3, 1).contiguous()
    module = torch.export.export(_OneLayer(op, weights, options), (pixels,)).module(check_guards=False)
    executor = Executor(module, device="cpu", threads=torch.get_num_threads())
    result = executor(pixels)
    program = executor.program(pixels)
    steps = [step for step in program.steps if step.backend == "native"]
    assert len(program.steps) == len(steps) == 1, "the layer must be one native step"

    def call(loop=program.loop, keep=executor):
        loop.run()

    return call, result
