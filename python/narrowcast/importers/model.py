"""What an importer returns, and the door that recognises a source."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from narrowcast.errors import ArgumentError, FormatError, UnsupportedError
from narrowcast.formats import GroupedWeight, Int8Weight

KINDS = ("decoder", "encoder", "image", "generic")


@dataclass
class Model:
    """An exported model with everything a plan needs beside the graph.

    exported: the program, as ``torch.export.export`` made it (no decompositions).
    kind: "decoder", "encoder", "image" or "generic"; it fixes the inputs and the output.
    config: sizes and token ids, JSON-able.
    assets: files that travel with the model: "tokenizer.json", "chat_template", "labels" ...
    native: parameter name -> the source file's own quantised form, rows in the parameter's order.
    source: "path" (the name only), "bytes" and "sha256" of a file or of all shards; empty for an object in memory.
    warnings: what is doubtful about the source, as sentences.
    """

    exported: torch.export.ExportedProgram
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    assets: dict[str, bytes] = field(default_factory=dict)
    native: dict[str, GroupedWeight | Int8Weight] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")


def describe_file(path: Path) -> dict[str, Any]:
    """``Model.source`` of one file."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": digest}


def describe_shards(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """``Model.source`` of a folder's weights. One file has its own sha256; several have that of their names and sums."""
    parts = [describe_file(f) for f in files]
    digest = parts[0]["sha256"]
    if len(parts) > 1:
        lines = "".join(f"{part['path']} {part['sha256']}\n" for part in parts)
        digest = hashlib.sha256(lines.encode()).hexdigest()
    return {"path": folder.name, "bytes": sum(part["bytes"] for part in parts), "sha256": digest}


def load_model(
    source: Any, example_inputs: tuple | None = None, *, dynamic_shapes: Any = None, **options: Any
) -> Model:
    """Imports a model.

    source: a ``torch.nn.Module`` (needs ``example_inputs``), a Hugging Face model object or folder,
        the path of a .gguf, .onnx or EfficientNet-Lite .pth file, or a :class:`Model` (returned as it is).
    example_inputs: the positional inputs of a module, as a tuple.
    dynamic_shapes: of a module, as ``torch.export.export`` takes them.
    options: what the importer of this kind of source takes (``pooling=`` of an encoder, for instance).

    Raises ArgumentError for a source or option of the wrong kind or a path that does not exist, FormatError
    for a damaged file, UnsupportedError for a model that would need something this version lacks.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, torch.nn.Module):
        from . import huggingface, torch_module

        if example_inputs is None and huggingface.is_pretrained(source):
            return _call(huggingface.from_object, source, options)
        options |= {"example_inputs": example_inputs, "dynamic_shapes": dynamic_shapes}
        return _call(torch_module.load, source, options)
    if not isinstance(source, str | os.PathLike):
        raise ArgumentError(
            "source must be a torch.nn.Module, a folder or a path of a .gguf or .onnx file, "
            f"got {type(source).__name__}"
        )
    if example_inputs is not None or dynamic_shapes is not None:
        raise ArgumentError("example_inputs and dynamic_shapes belong to a torch.nn.Module, not to a path")
    path = Path(source)
    if not path.exists():
        raise ArgumentError(f"source must exist, got {os.fspath(source)!r}")
    try:
        return _call(_importer(path), path, options)
    except (FormatError, UnsupportedError) as error:
        if path.name in str(error):
            raise
        # What is wrong with a tensor or an entry is said where it is read; which model it is, here.
        raise type(error)(f"{path.name}: {error}") from error


def _importer(path: Path):
    if path.is_dir():
        from . import huggingface

        return huggingface.from_folder
    if not path.is_file():
        raise ArgumentError(f"source must be a file or a folder, got {path.name!r}")
    suffix = path.suffix.lower()
    with open(path, "rb") as f:
        magic = f.read(4)
    if suffix == ".gguf" or magic == b"GGUF":
        from . import gguf_llama

        return gguf_llama.load
    if suffix == ".onnx":
        from . import onnx

        return onnx.load
    if suffix == ".pth":
        from . import efficientnet_lite

        return efficientnet_lite.load
    if not magic:
        raise FormatError(f"{path.name} is empty")
    raise UnsupportedError(
        f"{path.name} is no model file known here: a .gguf or .onnx file, an EfficientNet-Lite .pth file "
        "or a Hugging Face folder would be needed"
    )


def _call(importer, source, options: dict[str, Any]) -> Model:
    known = list(inspect.signature(importer).parameters)[1:]
    for name in options:
        if name not in known:
            raise ArgumentError(
                f"option {name!r} is unknown for this source; it takes {', '.join(known) or 'none'}"
            )
    return importer(source, **options)
