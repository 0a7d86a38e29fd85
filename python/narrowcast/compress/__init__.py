"""Compression: a model in, a plan with measured errors out. See :func:`narrowcast.compress`."""

from .api import RECIPES, compress

__all__ = ["RECIPES", "compress"]
