"""Weights in the quantised forms of other tools, as our kernels' own forms: nothing is rounded a second time.

One file per format; ``checkpoint`` reads the files they lie in, ``codes`` places what they mean. A weight that
no kernel's form holds exactly comes as its values in float32.
"""

from .checkpoint import weight_files
from .folder import METHODS, Weights, read_folder, settings_of

__all__ = ["METHODS", "Weights", "read_folder", "settings_of", "weight_files"]
