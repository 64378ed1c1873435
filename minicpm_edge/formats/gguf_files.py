"""A GGUF model is one file, or several of which llama.cpp is given the first and finds the others by their names."""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_number(path: Path) -> tuple[int, int]:
    """(number of this file, number of files): (1, 1) unless the name says otherwise."""
    part = _PART.fullmatch(path.name)
    return (int(part[2]), int(part[3])) if part else (1, 1)


def model_files(first: Path) -> list[Path]:
    """All files of the model whose first one is ``first``."""
    part = _PART.fullmatch(first.name)
    if part is None:
        return [first]
    stem, total = part[1], int(part[3])
    return [first.with_name(f"{stem}-{number:05d}-of-{total:05d}.gguf") for number in range(1, total + 1)]
