"""The key/value cache of a decoder: one tensor per cache input of the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Smallest capacity; larger ones are powers of two times it, up to the model's positions.
MIN_CAPACITY = 128


class KVCache:
    """Caches [B, Hkv, C, D] and, for INT8, scales [B, Hkv, C], in the order of the graph's inputs.

    layout: (dtype, Hkv, D) per tensor; D is None for scales.
    """

    def __init__(
        self,
        layout: Sequence[tuple[torch.dtype, int, int | None]],
        batch: int,
        capacity: int,
        device: torch.device,
    ):
        self.layout, self.batch, self.capacity, self.device = layout, batch, capacity, device
        self.tensors = self._new(capacity)

    def _new(self, capacity: int) -> list[Tensor]:
        # Zeros: a slot that was never written may be read under a mask, and 0 * NaN is not 0.
        with torch.inference_mode(False):  # else it could not be written outside of that mode
            return [
                torch.zeros(
                    (self.batch, heads, capacity, *([] if size is None else [size])),
                    dtype=dtype,
                    device=self.device,
                )
                for dtype, heads, size in self.layout
            ]

    def grow(self, capacity: int) -> None:
        """More slots; what is in them stays."""
        tensors = self._new(capacity)
        for new, old in zip(tensors, self.tensors):
            new[:, :, : self.capacity].copy_(old)
        self.tensors, self.capacity = tensors, capacity

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


def capacity_for(length: int, most: int) -> int:
    """The bucket that holds `length` positions."""
    capacity = MIN_CAPACITY
    while capacity < length:
        capacity *= 2
    return min(capacity, most)


def padded_length(length: int) -> int:
    """The bucket of a prefill of `length` tokens: 1, then 16 and on by 16 to 64, then steps of a third
    to a half of the size. At most a third of a bucket over 16 is padding."""
    if length <= 1:
        return length
    if length <= 64:
        return -(-length // 16) * 16
    size = 64
    while True:
        for bucket in (size * 3 // 2, size * 2):
            if length <= bucket:
                return bucket
        size *= 2
