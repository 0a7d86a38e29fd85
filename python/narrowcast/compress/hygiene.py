"""Is the data fit for what it was used for? Counted and measured when a plan is made, kept in its certificate.

``Plan.certificate["data"]`` holds, for calibration and for held-out data, how much there was and the error that
the plan makes on it, and what follows from these as sentences (``"warnings"``). Plans of earlier versions have
no such entry; None stands there when a plan was made without data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .metrics import bootstrap
from .sequential import ROWS_PER_INPUT

#: Recipes that look at calibration data; the others only measure on held-out data.
CALIBRATED = ("int8", "int8-weight", "int4", "auto")
#: Held-out error over calibration error from which a plan has learnt its calibration data by heart, where the
#: 95 % bounds lie apart as well. MiniLM on a novel: int8 0.99, int4 1.4; 7.2 without random texts and a ridge of 0.01.
OVERFIT = 1.5
#: Below these, ranges and second moments change visibly with other data of the same kind.
LEAST = {"decoder": 4096, "encoder": 2048, "image": 64, "generic": 64}
#: Scored items below which the bounds of a metric say little.
LEAST_SCORED = 50
#: Items on either side below which two mean errors are not compared.
LEAST_COMPARED = 8
MOST_PADDING = 0.5
#: Share of the held-out rows that calibration may have seen (sentences repeat in real text).
MOST_SHARED = 0.05

UNITS = {"decoder": "tokens", "encoder": "tokens", "image": "pictures", "generic": "rows"}
ERRORS = {
    "decoder": "KL(float32 || plan) per token",
    "encoder": "1 - cosine per text",
    "image": "KL(float32 || plan) per picture",
    "generic": "relative error of the output per row",
}

Batch = tuple[Tensor, ...]


def begin_token(tokenizer: Any, bos: int | None) -> int | None:
    """The id that a text begins with in use: the model's BOS, else what its tokenizer puts in front."""
    if bos is not None:
        return bos
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return whole[0] if whole[:1] != plain[:1] and whole[1 : 1 + len(plain)] == plain else None


def describe(
    kind: str,
    recipe: str,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    errors: tuple[Tensor | None, Tensor],
    begin: int | None = None,
    widest: int = 0,
) -> dict[str, Any]:
    """The entry of the certificate, plain JSON.

    errors: of every scored item of calibration (None: not measured) and of held-out data, 1-D.
    begin: the id that windows of a decoder should begin with. widest: most inputs of a layer that GPTQ
    rounded; 0 where there is none.
    """
    seen, kept = _amount(kind, calibration, errors[0]), _amount(kind, held_out, errors[1])
    known = {key for batch in calibration for key in _keys(kind, batch)}
    rows = [key for batch in held_out for key in _keys(kind, batch)]
    result = {
        "unit": UNITS[kind],
        "error": ERRORS[kind],
        "calibration": seen if recipe in CALIBRATED else None,
        "held_out": kept,
        "shared": sum(key in known for key in rows) / max(len(rows), 1) if recipe in CALIBRATED else 0.0,
        "held_out_over_calibration": _ratio(seen["error"], kept["error"]),
        "begin_token": begin,
        "without_begin_token": 0,
        "widest_rounded": widest,
    }
    if kind == "decoder" and begin is not None:
        windows = [ids for batch in (*calibration, *held_out) for ids in batch[0]]
        result["without_begin_token"] = sum(int(ids[0]) != begin for ids in windows) / len(windows)
    return result | {"warnings": warnings_of(kind, result)}


def warnings_of(kind: str, data: dict[str, Any]) -> list[str]:
    """What a user should know of the figures of :func:`describe`, as sentences."""
    unit, seen, kept, found = data["unit"], data["calibration"], data["held_out"], []
    if data["shared"] > MOST_SHARED:
        found.append(
            f"{data['shared']:.0%} of the held-out data was calibrated on as well: the measured errors are "
            "those of data that the plan knows; give more data"
        )
    if seen is not None:
        ratio = data["held_out_over_calibration"]
        enough = min(seen["scored"], kept["scored"]) >= LEAST_COMPARED
        if enough and ratio is not None and ratio > OVERFIT and kept["error"]["low"] > seen["error"]["high"]:
            found.append(
                f"overfitted: the error on held-out data is {ratio:.2f} times that on calibration data; "
                "give more, and more varied, data"
            )
        least = max(LEAST[kind], ROWS_PER_INPUT * data["widest_rounded"])
        if seen["rows"] < least:
            found.append(
                f"too little data: calibrated on {seen['rows']} {unit}, give {least} or more"
                + (
                    f" (the widest layer that was rounded has {data['widest_rounded']} inputs)"
                    if least > LEAST[kind]
                    else ""
                )
            )
        if seen["padding"] > MOST_PADDING:
            found.append(
                f"{seen['padding']:.0%} of the calibration tokens are padding, which is computed and not "
                "looked at: give texts of like length"
            )
    if kept["scored"] < LEAST_SCORED:
        found.append(f"too little data: metrics and bounds rest on {kept['scored']} held-out items")
    if data["without_begin_token"]:
        found.append(
            f"missing BOS: {data['without_begin_token']:.0%} of the windows do not begin with token "
            f"{data['begin_token']}, with which texts begin in use"
        )
    return found


def _amount(kind: str, batches: Sequence[Batch], errors: Tensor | None) -> dict[str, Any]:
    """How much there is: what counts (no padding), the share of padding, and the error with its bounds."""
    computed = rows = 0
    for batch in batches:
        first = batch[0]
        size = first.numel() if kind in ("decoder", "encoder") else (first.shape[0] if first.dim() else 1)
        computed += size
        rows += int(batch[1].sum()) if kind == "encoder" else size
    return {
        "batches": len(batches),
        "rows": rows,
        "padding": 1 - rows / computed if computed else 0.0,
        "scored": 0 if errors is None else errors.numel(),
        "error": _bounded(errors),
    }


def _bounded(errors: Tensor | None) -> dict[str, float] | None:
    """Mean and 95 % bounds; None where nothing was measured or it is no number."""
    if errors is None or not errors.numel() or not errors.isfinite().all():
        return None
    low, high = bootstrap(errors.double(), torch.mean)
    return {"value": errors.double().mean().item(), "low": low, "high": high}


def _ratio(seen: dict[str, float] | None, kept: dict[str, float] | None) -> float | None:
    # Errors of float32's own size are noise, and their ratio says nothing.
    if seen is None or kept is None or seen["value"] < 1e-9:
        return None
    ratio = kept["value"] / seen["value"]
    return ratio if math.isfinite(ratio) else None


def _keys(kind: str, batch: Batch) -> list[bytes]:
    """A digest per row, by which a row of held-out data is found again in calibration data."""
    count = {t.shape[0] if t.dim() else 1 for t in batch}
    if kind == "encoder":
        rows = [(ids[mask.bool()],) for ids, mask in zip(batch[0], batch[1])]
    elif kind in ("decoder", "image"):
        rows = [(row,) for row in batch[0]]
    elif len(count) == 1:
        rows = list(zip(*(t.reshape(t.shape[0] if t.dim() else 1, -1) for t in batch)))
    else:
        rows = [batch]
    return [_digest(row) for row in rows]


def _digest(tensors: Sequence[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for t in tensors:
        digest.update(f"{t.dtype} {list(t.shape)}".encode())
        if t.numel():
            digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
