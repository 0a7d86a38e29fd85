"""What is read of a plan's config, record, certificate and source: of the kinds that compress writes, or refused.

Keys that are not named here may hold anything; those that are named may be missing unless said otherwise, so that
plans of earlier versions read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from narrowcast.errors import FormatError

Check = Callable[[Any, str], None]


def check_config(config: Any) -> None:
    """Raises FormatError that names the first of the model's figures of a wrong kind."""
    _CONFIG(config, "config")


def check_document(record: Any, certificate: Any, source: Any) -> None:
    """Raises FormatError that names the first part of a wrong kind."""
    _RECORD(record, "record")
    _CERTIFICATE(certificate, "certificate")
    _SOURCE(source, "source")


def check_record(record: Any) -> None:
    """Raises FormatError that names the first part of a wrong kind."""
    _RECORD(record, "record")


# --- vocabulary -----------------------------------------------------------------------------------


def _refuse(path: str, wanted: str, value: Any) -> None:
    raise FormatError(
        f"the plan's record is not well formed: {path[:120]} must be {wanted}, got {type(value).__name__}"
    )


def _text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        _refuse(path, "a text", value)


def _number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(path, "a number", value)


def _count(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(path, "a whole number", value)


def _or_none(check: Check) -> Check:
    return lambda value, path: None if value is None else check(value, path)


def _each(check: Check, length: int | None = None) -> Check:
    def run(value: Any, path: str) -> None:
        if not isinstance(value, list) or len(value) != (len(value) if length is None else length):
            _refuse(path, "a list" if length is None else f"a list of {length}", value)
        for index, item in enumerate(value):
            check(item, f"{path}[{index}]")

    return run


def _named(check: Check) -> Check:
    def run(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            _refuse(path, "an object", value)
        for name, item in value.items():
            check(item, f"{path}.{name}")

    return run


def _object(needed: dict[str, Check], known: dict[str, Check] | None = None) -> Check:
    def run(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            _refuse(path, "an object", value)
        for name, check in {**needed, **(known or {})}.items():
            if name in value:
                check(value[name], f"{path}.{name}")
            elif name in needed:
                raise FormatError(f"the plan's record is not well formed: {path} lacks {name}")

    return run


# --- the parts ------------------------------------------------------------------------------------

_LAYER = _object({}, {
    "name": _text, "op": _text, "precision": _text, "why": _text, "notes": _each(_text),
    "sqnr_db": _or_none(_number), "alpha": _or_none(_number), "damping": _or_none(_number),
    "group_size": _or_none(_count), "dead": _or_none(_count),
})  # fmt: skip
_RECORD = _object({}, {
    "layers": _or_none(_each(_LAYER)), "warnings": _or_none(_each(_text)), "kv_cache": _or_none(_text),
    "bytes_float32": _or_none(_count), "first_damping": _or_none(_number),
})  # fmt: skip

_ERROR = _or_none(_object({"value": _number, "low": _number, "high": _number}))
_AMOUNT = _object({"batches": _count, "rows": _count, "padding": _number, "error": _ERROR})
_DATA = _object({
    "unit": _text, "error": _text, "calibration": _or_none(_AMOUNT), "held_out": _AMOUNT, "shared": _number,
    "held_out_over_calibration": _or_none(_number), "begin_token": _or_none(_count),
    "without_begin_token": _number, "warnings": _each(_text),
})  # fmt: skip
_CERTIFICATE = _object({}, {
    "metrics": _or_none(_named(_number)), "bounds": _or_none(_named(_each(_number, 2))), "loss": _or_none(_number),
    "data": _or_none(_DATA), "measured_on": _object(dict.fromkeys(("device", "kernels", "torch"), _text)),
})  # fmt: skip
_SOURCE = _object({}, {
    "name": _or_none(_text), "path": _or_none(_text), "bytes": _or_none(_count), "sha256": _or_none(_text),
})  # fmt: skip


def _token_ids(value: Any, path: str) -> None:
    for item in value if isinstance(value, list) else [value]:
        _count(item, path)


_IMAGE = _object(
    {}, {"size": _count, "mean": _each(_number, 3), "std": _each(_number, 3), "range": _each(_number, 2)}
)
_CONFIG = _object({}, {
    **dict.fromkeys(("context", "max_position_embeddings", "bos_token_id", "pad_token_id"), _or_none(_count)),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token"), _or_none(_text)),
    "eos_token_id": _or_none(_token_ids), "image": _or_none(_IMAGE),
})  # fmt: skip
