"""From a model that exists to an exported program: modules, Hugging Face folders, GGUF and ONNX files."""

from .model import Model, load_model

__all__ = ["Model", "load_model"]
