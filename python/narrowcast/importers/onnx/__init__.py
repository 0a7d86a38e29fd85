"""ONNX files, read with the package ``onnx`` and rebuilt as ATen operations.

``reader`` checks the file, ``module`` evaluates it node by node while torch.export watches, ``table`` holds
what each operator means.
"""

from .module import load

__all__ = ["load"]
