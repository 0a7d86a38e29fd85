"""One op through the executor's door: its step, made by the C++ factory."""

from __future__ import annotations

from torch import Tensor

from narrowcast import _runtime


def _view(t: Tensor | None):
    if t is None:
        return None
    dtype = _runtime.DTYPES.index(str(t.dtype).removeprefix("torch."))
    return t.data_ptr(), dtype, list(t.shape), list(t.stride())


def run_step(
    op: str, inputs: list[Tensor | None], outputs: list[Tensor], constant: list[bool] | None = None,
    times: int = 1, **attributes,
) -> None:  # fmt: skip
    """Runs the native step of ``op`` ``times`` times; results land in ``outputs``."""
    program = _runtime.Program()
    program.add_native(
        "node", op, [_view(t) for t in inputs], constant or [False] * len(inputs),
        [_view(t) for t in outputs], attributes, _runtime.PackCache(),
    )  # fmt: skip
    for _ in range(times):
        program.run()
