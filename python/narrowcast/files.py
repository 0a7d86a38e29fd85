"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArgumentError


def check_writable(path: str | os.PathLike) -> None:
    """Raises ArgumentError when a file cannot be made at ``path``: before work that would be lost."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ArgumentError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ArgumentError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"cannot write {path}: the folder {path.parent} may not be written to")


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the same folder, which becomes ``path`` when the block ends without an error.

    A reader sees the old file or the new one, never a part, and so does a machine that lost its power: file and
    folder are synced. After an error nothing is left behind.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """The new name, too, is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
