"""Compression: a model in, a plan with measured errors out.

``narrowcast.compress(model, ...)`` is the call (:func:`narrowcast.compress.api.compress`). The package and the
call share their name, so the package itself can be called, whichever way it was imported first.
"""

import sys
from types import ModuleType

from .api import RECIPES, compress

__all__ = ["RECIPES", "compress"]


class _Callable(ModuleType):
    __call__ = staticmethod(compress)


sys.modules[__name__].__class__ = _Callable
