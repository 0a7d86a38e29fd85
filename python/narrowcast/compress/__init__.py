"""Compression: a model in, a plan with measured errors out; and what it is worth on other data.

``narrowcast.compress(model, ...)`` is the call (:func:`narrowcast.compress.api.compress`). The package and the
call share their name, so the package itself can be called, whichever way it was imported first.
"""

import sys
from types import ModuleType

from .api import RECIPES, compress, predict
from .evaluation import Evaluation, evaluate

__all__ = ["RECIPES", "Evaluation", "compress", "evaluate", "predict"]


class _Callable(ModuleType):
    __call__ = staticmethod(compress)


sys.modules[__name__].__class__ = _Callable
