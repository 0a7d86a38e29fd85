"""Graphs: the form, the passes that fuse it, and the plan file that keeps it."""

from .ir import Graph
from .plan import Plan

__all__ = ["Graph", "Plan"]
