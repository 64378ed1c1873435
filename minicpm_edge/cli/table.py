"""Columns of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], *, num_left: int | None = None) -> str:
    """``rows`` (all of one length) as lines with their columns lined up, two spaces apart.

    The first ``num_left`` columns stand at their left edge, the others (figures) at their right; None: all left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    num_left = len(widths) if num_left is None else num_left
    lines = (
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
