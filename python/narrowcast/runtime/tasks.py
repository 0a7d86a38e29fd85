"""Pictures in: from files to what an image model takes, and from its outputs to classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, FormatError, UnsupportedError
from .executor import Executor

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def to_pixels(image: Any, config: dict[str, Any]) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, size, size]: the shorter side resized, the middle cropped, normalised."""
    settings = config.get("image") or {}
    size = int(settings.get("size", 224))
    x = torch.as_tensor(image).permute(2, 0, 1)[None].float()
    height, width = x.shape[2:]
    # Resized to a little more than the crop, as is usual for classifiers.
    scale = size * 1.143 / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    x = torch.nn.functional.interpolate(x, shape, mode="bilinear", antialias=True)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return normalise(x[:, :, top : top + size, left : left + size], config)


def normalise(x: Tensor, config: dict[str, Any]) -> Tensor:
    """(x - mean) / std per channel, x in the range 0..255 unless the model's config says 0..1."""
    settings = config.get("image") or {}
    mean = torch.tensor(settings.get("mean", [0.0, 0.0, 0.0])).reshape(1, 3, 1, 1)
    std = torch.tensor(settings.get("std", [1.0, 1.0, 1.0])).reshape(1, 3, 1, 1)
    if settings.get("range", [0, 255])[1] == 1:
        x = x / 255
    return (x - mean) / std


def load_picture(path: str | Path, config: dict[str, Any]) -> Tensor:
    """One picture file as the model takes it. Raises ArgumentError or FormatError."""
    try:
        import numpy
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UnsupportedError("pictures need the package pillow: pip install pillow") from error
    if not Path(path).is_file():
        raise ArgumentError(f"there is no picture {path}")
    try:
        with Image.open(path) as picture:
            array = numpy.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise FormatError(f"{path} is not a picture that can be read: {error}") from error
    return to_pixels(array.copy(), config)


def picture_files(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, in order of their names; none where there is no folder."""
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def load_folder(folder: Path, config: dict[str, Any]) -> Tensor:
    """All pictures of a folder, in order of their names."""
    if not folder.is_dir():
        raise ArgumentError(f"data must be a folder of pictures, there is none at {folder}")
    files = picture_files(folder)
    if not files:
        raise ArgumentError(f"data must be a folder of pictures; {folder} holds none")
    return torch.cat([load_picture(p, config) for p in files])


def classify(executor: Executor, files: Sequence[str | Path], top: int = 5) -> list[list[dict[str, Any]]]:
    """For each picture the likeliest classes, as {"label", "index", "probability"}."""
    labels = executor.assets.get("labels", b"").decode().splitlines()
    results = []
    for file in files:
        probabilities = executor(load_picture(file, executor.config)).float().softmax(-1)[0]
        values, indices = probabilities.topk(min(top, probabilities.numel()))
        results.append(
            [
                {
                    "label": labels[i] if i < len(labels) else f"class {i}",
                    "index": i,
                    "probability": round(v, 6),
                }
                for v, i in zip(values.tolist(), indices.tolist())
            ]
        )
    return results
