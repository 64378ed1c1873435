"""Files and folders that appear whole or not at all.

Everything is written beside its final place, flushed to the disk and renamed: a kill at any moment leaves the old
one or the new one, never a half. Leftovers are named ``.NAME.tmp-*`` and ``.NAME.old-*`` and cleaned up next time.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``; on success it takes that place, on any exception it is removed.

    Raises:
        OSError: for a disk that is full, or a place that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary = _beside(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _sync(file)
        _sync(temporary)
        _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a file name beside ``path`` to write; on success it takes that place, on any exception it is removed.

    Raises:
        OSError: for a disk that is full, or a place that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def recover(path: Path) -> None:
    """Undo what a killed writer of ``path`` left: its half-written files go, a folder set aside comes back.

    Only one process may write a given path at a time.
    """
    if not path.parent.is_dir():
        return
    for leftover in sorted(path.parent.glob(f".{path.name}.old-*")):
        if path.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            # Killed between setting the old folder aside and renaming the new one.
            leftover.rename(path)
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _beside(path: Path, label: str) -> Path:
    return path.parent / f".{path.name}.{label}-{uuid.uuid4().hex[:8]}"


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
    else:
        old = _beside(path, "old")
        # A folder that is not empty cannot be renamed over.
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        # Windows has no way to flush a folder, and renames are journalled.
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
