"""What kernels make of weights before they multiply by them: sums, other orders of memory.

A call makes it and throws it away, since a tensor may change between two calls. The runtime of a plan, whose weights never
do, keeps it: in ``with store.use():`` everything asked for by :func:`prepared` is made once per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor


class Prepared:
    """What was made of these weights, which do not change and outlive this store."""

    def __init__(self, weights: Iterable[Tensor]):
        self._storages = {t.untyped_storage().data_ptr() for t in weights if t.numel()}
        self._made: dict[tuple, Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._made.values())

    @contextmanager
    def use(self, keep: bool = True) -> Iterator[None]:
        """keep: whether something new may stay. Not while a graph is recorded: nothing is computed then, and its memory is
        the graph's.
        """
        token = _current.set((self, keep))
        try:
            yield
        finally:
            _current.reset(token)

    def get(self, what: str, weight: Tensor, make: Callable[[], Tensor], keep: bool) -> Tensor:
        if weight.is_meta or weight.untyped_storage().data_ptr() not in self._storages:
            return make()
        key = (what, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        made = self._made.get(key)
        if made is None:
            made = make()
            if keep:
                self._made[key] = made
        return made


_current: ContextVar[tuple[Prepared, bool] | None] = ContextVar("narrowcast_prepared", default=None)


def prepared(what: str, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """``make()`` of a weight, or its result of an earlier call where a store of weights is in use.

    what: names the result, with all that it depends on but the weight.
    """
    current = _current.get()
    return make() if current is None else current[0].get(what, weight, make, current[1])
