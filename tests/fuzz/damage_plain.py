"""Damage that needs to know nothing of a format but that its files are bytes, or JSON."""

from __future__ import annotations

import json
from random import Random
from typing import Any

Damaged = tuple[bytes, str]

INTEGERS = (
    0, 1, 2, 3, -1, -2, 7, 33, 255, 65535, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40,
    1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *INTEGERS, 10**30, None, True, False, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "int4", "float32", "x" * 200,
    "../x", [], [0], [1 << 40, 1 << 40], [[]], {}, {"a": 1}, {"dtype": "F32"},
)  # fmt: skip


# --- bytes --------------------------------------------------------------------------------------------


def cut(data: bytes, dice: Random, places: list[int] | None = None) -> Damaged:
    """The beginning of a file: up to one of the places where a part of it ends, or beside it."""
    places = places or [8, len(data) // 2]
    at = dice.choice(
        (dice.choice(places) + dice.choice((-1, 0, 0, 1)), dice.randrange(len(data)), 0, len(data) - 1)
    )
    at = min(max(at, 0), len(data) - 1)
    return data[:at], f"cut at {at} of {len(data)}"


def flip(data: bytes, dice: Random, places: list[int] | None = None) -> Damaged:
    """Some bytes set to others, most of them in the first 2000, where headers are."""
    raw = bytearray(data)
    end = min(len(raw), 2000) if dice.random() < 0.6 else len(raw)
    count = dice.choice((1, 1, 2, 8, 64))
    for _ in range(count):
        raw[dice.randrange(end)] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
    return bytes(raw), f"{count} bytes of the first {end} set"


def shift(data: bytes, dice: Random, places: list[int] | None = None) -> Damaged:
    """A run of bytes left out, put in twice, zeroed, or rubbish behind the end."""
    at, count = dice.randrange(len(data)), dice.choice((1, 2, 4, 8, 64, 1024))
    how = dice.choice(("left out", "twice", "zeroed", "appended"))
    if how == "left out":
        return data[:at] + data[at + count :], f"{count} bytes at {at} left out"
    if how == "twice":
        return data[: at + count] + data[at:], f"{count} bytes at {at} twice"
    if how == "zeroed":
        part = len(data[at : at + count])
        return data[:at] + bytes(part) + data[at + part :], f"{part} bytes at {at} zeroed"
    return data + dice.randbytes(count), f"{count} bytes appended"


# --- JSON ---------------------------------------------------------------------------------------------


def _places(value: Any, at: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for key, v in list(inner)[:400] for p in _places(v, (*at, key)))]


def change_json(document: Any, dice: Random) -> tuple[Any, str]:
    """A copy with one entry of another kind, of an extreme size, left out, or doubled."""
    document = json.loads(json.dumps(document))
    places = _places(document)
    shown = ""
    at = dice.choice(places[1:] or places)
    if not at:
        return dice.choice(_VALUES), "the whole document replaced"
    inner = document
    for key in at[:-1]:
        inner = inner[key]
    how = dice.random()
    where = ".".join(map(str, at))
    if how < 0.15:
        del inner[at[-1]]
        return document, f"{where} left out"
    if how < 0.25 and isinstance(inner, list):
        inner.insert(at[-1], inner[at[-1]])
        return document, f"{where} twice"
    if how < 0.3:
        deep: Any = 0
        depth = dice.choice((60, 5000))
        for _ in range(depth):
            deep = [deep]
        value, shown = deep, f"{depth} lists in each other"
    elif how < 0.4 and isinstance(inner[at[-1]], int) and not isinstance(inner[at[-1]], bool):
        value = inner[at[-1]] + dice.choice((-1, 1, 2, -2))
    else:
        value = dice.choice(_VALUES)
    inner[at[-1]] = value
    return document, f"{where} = {shown or str(value)[:40]}"


def dump(document: Any) -> str:
    """JSON of a document that may be nested deeper than Python's own writer goes."""
    try:
        return json.dumps(document)
    except RecursionError:
        return (
            json.dumps(str(type(document)))
            if not isinstance(document, dict)
            else ("{" + ", ".join(f"{json.dumps(k)}: {_flat(v)}" for k, v in document.items()) + "}")
        )


def _flat(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000 + "]" * 5000


def json_file(data: bytes, dice: Random) -> Damaged:
    document, what = change_json(json.loads(data), dice)
    return dump(document).encode(), what
