"""Quantised weights as files of other tools. What cannot be written without rounding again is refused."""

from .compressed_tensors import write_compressed_tensors
from .gguf import write_gguf
from .onnx import write_onnx

__all__ = ["write_compressed_tensors", "write_gguf", "write_onnx"]
