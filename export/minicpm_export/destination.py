"""Where an export goes, and what may be replaced there."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from minicpm_edge.errors import UserError
from minicpm_export.verify.certificate import FILE_NAME, Certificate, read, write

# Written early in every GGUF of ours: only those are replaced without being asked.
MADE_BY_KEY = "minicpm_edge.version"
HEAD_BYTES = 1 << 16


def gguf_path(out: Path | None, *, name: str, quant: str, run: Path | None) -> Path:
    """The file to write: ``out`` itself, a file in the folder ``out``, or by default one in the run's ``exports``."""
    file = f"{name}-{quant}.gguf"
    if out is None:
        return _exports(run) / file
    if out.is_dir():
        return out / file
    if out.suffix != ".gguf":
        raise UserError(f"{out}: the name of a GGUF must end in .gguf, or be a folder that exists")
    return out


def folder_path(out: Path | None, *, name: str, kind: str, run: Path | None) -> Path:
    """The folder to write: ``out``, or by default one in the run's ``exports``."""
    return out if out is not None else _exports(run) / f"{name}-{kind}"


def _exports(run: Path | None) -> Path:
    return run / "exports" if run is not None else Path()


def check_file(path: Path, *, force: bool) -> None:
    """Raise :class:`UserError` where writing ``path`` would destroy something that is not an export of ours."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; choose another --out")
    if path.exists() and not force and not _is_our_gguf(path):
        raise UserError(
            f"{path} exists and is no export of this command; choose another --out or add --force"
        )


def check_folder(path: Path, *, force: bool) -> None:
    """The same for a folder. Even ``force`` replaces only folders that hold a model."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; --out takes a folder here")
    if not any(path.iterdir()) or _is_our_folder(path):
        return
    if not force:
        raise UserError(
            f"{path} exists and is no export of this command, or holds other files too; "
            "choose another --out or add --force"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a model folder; --force will not replace it, choose another --out")


def _is_our_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return head.startswith(b"GGUF") and MADE_BY_KEY.encode() in head


def _is_our_folder(path: Path) -> bool:
    """Whether the folder's certificates name every file in it."""
    listed = {FILE_NAME}
    for entry in read(path)["certificates"].values():
        listed.update(entry["sha256"])
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    return len(listed) > 1 and present <= listed


def rejected(temporary: Path, out: Path, failed: Certificate) -> UserError:
    """Put an export that failed its certificate aside, beside ``out``, and say so; an earlier ``out`` is untouched."""
    aside = out.with_name(f"{out.stem}.rejected{out.suffix}")
    if aside.is_dir():
        shutil.rmtree(aside)
    temporary.replace(aside)
    if aside.is_file():
        hashes = {aside.name: failed.sha256[failed.file]}
        write(aside.parent, dataclasses.replace(failed, file=aside.name, sha256=hashes))
    return UserError(
        f"the export is not the model: {'; '.join(failed.failures)}; it was put aside as {aside}"
    )
