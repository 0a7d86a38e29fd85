"""What a user gives as data, read the same way for calibration and for evaluation."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from narrowcast.errors import ArgumentError, FormatError
from narrowcast.graph import Graph
from narrowcast.graph.serialize import input_type
from narrowcast.runtime.tasks import picture_files
from narrowcast.runtime.text import load_tokenizer

#: Texts shorter than this are headings and page numbers, when a document is cut into sentences.
LEAST_SENTENCE = 20

Label = int | str


# --- pictures -------------------------------------------------------------------------------------


def fixed_batch(graph: Graph) -> int | None:
    """How many pictures a model always takes at once (files are often made for one); None: any number."""
    size = input_type(graph.inputs[0])[1][0]
    return size if isinstance(size, int) else None


def picture_batches(pictures: Tensor, size: int, fixed: int | None) -> list[tuple[Tensor, ...]]:
    """Rows of [N, 3, H, W] in batches of ``size``; a last batch that a fixed size does not fit is left out.

    Raises ArgumentError when there are fewer pictures than a fixed batch.
    """
    batches: list[tuple[Tensor, ...]] = [(x,) for x in pictures.split(size)]
    if fixed is not None and batches[-1][0].shape[0] < fixed:
        batches.pop()
    if not batches:
        raise ArgumentError(
            f"data must hold at least {5 * (fixed or 1)} pictures: the model takes {fixed} at once, and a fifth "
            "of them is held out"
        )
    return batches


# --- texts ----------------------------------------------------------------------------------------


def read_texts(data: Any) -> list[str]:
    """The texts of ``data``: a text, a list of texts, the path of a text file, or of a folder of .txt files.

    A string that names no file is a text; a ``Path`` must exist. Raises ArgumentError.
    """
    if isinstance(data, str | Path):
        # os.path, unlike Path, says no to a text that is too long for a name instead of raising.
        if os.path.isdir(data):
            files = sorted(p for p in Path(data).iterdir() if p.suffix.lower() == ".txt" and p.is_file())
            if not files:
                raise ArgumentError(f"data must be a text file or a folder of .txt files; {data} holds none")
            return [f.read_text(errors="replace") for f in files]
        if os.path.isfile(data):
            return [Path(data).read_text(errors="replace")]
        if isinstance(data, Path):
            raise ArgumentError(f"data must be a file or a folder, there is none at {data}")
        return [data]
    if not isinstance(data, Sequence) or not all(isinstance(t, str) for t in data) or not data:
        raise ArgumentError("data must be a text, a list of texts or the path of a text file")
    return list(data)


def sentences(texts: list[str], most: int | None = None) -> list[str]:
    """A document, which is a single text, as its first ``most`` sentences; several texts as they are."""
    if len(texts) != 1:
        return texts
    parts = (t.strip() for t in re.split(r"(?<=[.!?])\s+", texts[0]))
    return [t for t in parts if len(t) > LEAST_SENTENCE][:most]


def plain_tokenizer(assets: Mapping[str, bytes]) -> Any:
    """The model's tokenizer, which neither pads nor cuts. Raises ArgumentError when there is none."""
    if "tokenizer.json" not in assets:
        raise ArgumentError("data cannot be used: this model has no tokenizer")
    tokenizer = load_tokenizer(assets)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


# --- labelled pictures ----------------------------------------------------------------------------


def labelled_pictures(folder: Path, labels: Any = None) -> tuple[list[Path], list[Label | None]]:
    """The pictures of a folder, and the label of each, or None.

    The pictures lie in the folder itself, or in one subfolder per label. labels: instead of the subfolders' names
    a mapping from file (relative to the folder) to label, or the path of a .csv file with rows ``file,label`` or
    of a .json file with such an object or a list of ``{"file": ..., "label": ...}``.

    Raises ArgumentError for a folder without pictures and for labels that match no picture, FormatError for a file
    of labels that cannot be read.
    """
    files = picture_files(folder)
    given: list[Label | None] = [None] * len(files)
    if not files and folder.is_dir():
        for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
            found = picture_files(sub)
            files += found
            given += [sub.name] * len(found)
    if not files:
        place = f"{folder} holds none" if folder.is_dir() else f"there is none at {folder}"
        raise ArgumentError(f"data must be a folder of pictures, or of subfolders of pictures; {place}")
    if labels is None:
        return files, given
    table = labels if isinstance(labels, Mapping) else _read_labels(labels)
    names = [f.relative_to(folder).as_posix() for f in files]
    unknown = sorted(set(table) - set(names))
    if unknown:
        raise ArgumentError(
            f"labels must name pictures of the data, got {unknown[0]!r} ({len(unknown)} of {len(table)} match none); "
            f"pictures are named relative to {folder}, such as {names[0]!r}"
        )
    return files, [table.get(name) for name in names]


def _read_labels(labels: Any) -> dict[str, Label]:
    if not isinstance(labels, str | Path):
        raise ArgumentError(
            "labels must be a mapping from file to label or the path of a .csv or .json file, "
            f"got {type(labels).__name__}"
        )
    path = Path(labels)
    if not path.is_file():
        raise ArgumentError(f"labels must be a file, there is none at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin their files with a mark
        rows = _json_rows(json.loads(text)) if path.suffix.lower() == ".json" else _csv_rows(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise FormatError(f"{path} must hold a file and a label per row: {error}") from error
    table: dict[str, Label] = {}
    for file, label in rows:
        if table.setdefault(file, label) != label:
            raise FormatError(f"{path} gives {file!r} two labels")
    if not table:
        raise FormatError(f"{path} holds no labels")
    return table


def _csv_rows(text: str) -> list[tuple[str, Label]]:
    rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if row]
    if rows and rows[0][-1:] == ["label"]:
        rows = rows[1:]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"got {','.join(row)[:80]!r}")
    return [(file, label.strip()) for file, label in rows]


def _json_rows(document: Any) -> list[tuple[str, Label]]:
    if isinstance(document, dict):
        rows = list(document.items())
    elif isinstance(document, list) and all(
        isinstance(row, dict) and row.keys() >= {"file", "label"} for row in document
    ):
        rows = [(row["file"], row["label"]) for row in document]
    else:
        raise ValueError('got neither an object nor a list of {"file": ..., "label": ...}')
    for file, label in rows:
        if not isinstance(file, str) or isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"got {str(file)[:80]!r}: {str(label)[:80]!r}")
    return rows


def class_indices(labels: Sequence[Label | None], names: Sequence[str], classes: int) -> list[int]:
    """Labels as indices of classes, -1 where there is none. A label is a name of the model's, else a number.

    Raises ArgumentError for a label that is neither.
    """
    known = {name: index for index, name in enumerate(names[:classes])}
    result = []
    for label in labels:
        index = -1 if label is None else known.get(str(label), label)
        if isinstance(index, str):
            index = int(index) if index.isdecimal() and len(index) < 10 else -1
        if label is not None and not 0 <= index < classes:
            hint = f"the model's names, such as {names[0]!r}, or" if names else "this model carries no names:"
            raise ArgumentError(
                f"labels must be classes of the model, got {str(label)[:80]!r}; give {hint} numbers from 0 to {classes - 1}"
            )
        result.append(int(index))
    return result


def labels_of_rows(labels: Any, rows: int) -> list[Label | None]:
    """Labels of a tensor of pictures: None, or one per row. Raises ArgumentError."""
    if labels is None:
        return [None] * rows
    given = labels.tolist() if isinstance(labels, Tensor) else labels
    plain = isinstance(given, Sequence) and not isinstance(given, str)
    if not plain or len(given) != rows or not all(isinstance(x, int | str) for x in given):
        raise ArgumentError(f"labels must be {rows} class numbers or names, one per picture of the tensor")
    return list(given)
