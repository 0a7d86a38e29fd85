"""Fusions. One file per fusion; :mod:`.manager` holds their order and what each needs.

What :func:`optimize` leaves is the *fused float graph*: every dense layer is ``narrowcast.linear`` and every
convolution ``narrowcast.conv2d`` with bias, activation and residual inside, batch norms are folded, norms,
rotary embeddings, gates and attention are narrowcast ops, layers that share an input are merged. Whatever no
pass knows stays an ATen call.
"""

from .manager import DEFAULT, Pass, Report, optimize, run_passes

__all__ = ["DEFAULT", "Pass", "Report", "optimize", "run_passes"]
