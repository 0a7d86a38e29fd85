"""Tensors that lie flush against pages which nobody may touch.

One region per tensor of a case, an inaccessible page before and behind it. The bytes of the region
that belong to no tensor hold a canary; a kernel that writes there is caught by :meth:`Memory.intact`.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
CANARY = 0xA5
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Region:
    """``size`` readable and writable bytes between two guard pages."""

    def __init__(self, size: int):
        self.size = size
        self.map = mmap.mmap(-1, size + 2 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8, count=size, offset=PAGE)
        self.bytes.fill_(CANARY)
        for guard in (base, base + PAGE + size):
            if _libc.mprotect(guard, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect failed")
        self.views: dict[torch.dtype, Tensor] = {}
        self.used = (0, 0)

    def as_dtype(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.views:
            self.views[dtype] = self.bytes.view(dtype)
        return self.views[dtype]


class Memory:
    """Regions handed out in order and taken back together by :meth:`reset`."""

    def __init__(self, regions: int = 16, size: int = 192 * PAGE):
        self.size = size
        self.regions = [Region(size) for _ in range(regions)]
        self.next = 0

    def reset(self) -> None:
        for region in self.regions[: self.next]:
            low, high = region.used
            region.bytes[low:high] = CANARY
        self.next = 0

    def fits(self, extent: int, dtype: torch.dtype) -> bool:
        return extent * dtype.itemsize <= self.size

    def place(
        self, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, front: bool, gap: int
    ) -> Tensor:
        """A tensor whose last element ends at the rear guard, or whose first lies ``gap`` elements
        behind the front guard."""
        region = self.regions[self.next]
        self.next += 1
        extent = 0 if 0 in sizes else 1 + sum((n - 1) * s for n, s in zip(sizes, strides) if n > 1)
        whole = region.as_dtype(dtype)
        room = whole.numel() - extent
        start = min(gap, room) if front else room
        region.used = (start * dtype.itemsize, (start + extent) * dtype.itemsize)
        if extent == 0:
            strides, start = tuple(min(s, 1) for s in strides), 0
        return torch.as_strided(whole, sizes, strides, start)

    def intact(self) -> bool:
        """Whether every byte outside the tensors of this case still holds the canary."""
        for region in self.regions[: self.next]:
            low, high = region.used
            for part in (region.bytes[max(0, low - 4096) : low], region.bytes[high : high + 4096]):
                if part.numel() and not bool((part == CANARY).all()):
                    return False
        return True
