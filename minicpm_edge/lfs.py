"""Git LFS pointers: what lies in a cloned repository in place of a large file until it is fetched."""

from __future__ import annotations

from pathlib import Path

from minicpm_edge.errors import UserError

HEAD, MAX_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def refuse_pointer(file: Path) -> None:
    """Raises :class:`UserError` where the file is a pointer; anything else is left to its reader."""
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(HEAD)) == HEAD
        is_pointer = is_pointer and file.stat().st_size <= MAX_BYTES
    except OSError:
        return
    if is_pointer:
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in its folder"
        )
