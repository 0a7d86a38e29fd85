"""Signs that a checkpoint does not mean what its settings say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from narrowcast.formats import GroupedWeight

#: Rows of a layer that are looked at, and groups in all below which nothing is said.
ROWS, LEAST_GROUPS = 64, 256
#: Of the codes' number, the share by which weights may lie off zero on average: half a step of 4 bits. And the
#: standard errors beyond which that is no chance.
MOST, CERTAIN = 1 / 32, 8.0


def zero_points(weights: Mapping[str, Any]) -> list[str]:
    """A sentence when the weights of a checkpoint lie off zero by whole steps of their grids, else nothing.

    Trained weights are centred: over many groups the mean of (code - zero point) is a small part of a step. Files
    that store zero points in another way than their settings say (GPTQ's versions 1 and 2 differ by one, signed
    and unsigned codes by half of the range) shift every group the same way.
    """
    found = []
    for bits in (4, 8):
        layers = [_centres(w) for w in weights.values() if isinstance(w, GroupedWeight) and w.bits == bits]
        centres = torch.cat(layers) if layers else torch.empty(0)
        if centres.numel() < LEAST_GROUPS:
            continue
        mean, error = centres.mean().item(), centres.std().item() / centres.numel() ** 0.5
        if abs(mean) > max(MOST * (1 << bits), CERTAIN * error):
            found.append(
                f"its {bits}-bit weights lie {mean:+.2f} steps off zero on average, as if zero points were stored in "
                "another way than its settings say (checkpoint_format gptq or gptq_v2, signed or unsigned): compare "
                "its outputs with the model's before use"
            )
    return found


def _centres(weight: GroupedWeight) -> Tensor:
    """The mean of every group in steps of its grid."""
    rows = min(ROWS, weight.shape[0])
    take = lambda t: None if t is None else t[:rows]  # noqa: E731
    part = GroupedWeight(
        weight.bits, weight.group_size, *map(take, (weight.packed, weight.scale, weight.offset))
    )
    scale = part.scale.double()
    means = part.dequantize().double().unflatten(1, (-1, weight.group_size)).mean(-1)
    usable = (scale != 0) & means.isfinite() & scale.isfinite()
    return means[usable] / scale[usable]
