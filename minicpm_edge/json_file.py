"""JSON files that hold one object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm_edge.errors import UserError
from minicpm_edge.lfs import refuse_pointer


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The object in a JSON file; with ``missing_ok`` an empty one where there is no such file.

    Raises:
        UserError: naming the file, where it is missing, unreadable, not JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write one object as indented UTF-8, with a newline at the end on every system. Not atomic by itself."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
