"""Where an export goes, and what may be replaced there."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from minicpm_edge.errors import UserError
from minicpm_export.format import Format
from minicpm_export.verify import certificate
from minicpm_export.verify.certificate import Certificate

# Written early in every GGUF of ours: only those are replaced without being asked.
MADE_BY_KEY = "minicpm_edge.version"
HEAD_BYTES = 1 << 16


def choose_destination(
    form: Format, out: Path | None, *, model: str, run: Path | None, force: bool = False
) -> Path:
    """The file or folder to write.

    Args:
        form: the format, which knows the usual name.
        out: what the user asks for, if anything: the place itself, or for a single file a folder to write it in.
        model: the model's name.
        run: the run it belongs to, whose folder ``exports`` is the place unless ``out`` names another.
        force: whether the user agrees to lose what is there.

    Raises:
        UserError: where writing would destroy something that is not an export of ours. Even ``force`` replaces
            no folder but those that hold a model.
    """
    # As the file system's encoding spells it, which in a locale without UTF-8 is not ours.
    name = os.fsdecode(form.file_name(model).encode())
    if out is None:
        out = (run / "exports" if run is not None else Path()) / name
    elif not form.is_folder and out.is_dir():
        out /= name
    elif not form.is_folder and out.suffix != Path(name).suffix:
        raise UserError(
            f"--out {out}: the file's name must end in {Path(name).suffix}, or be a folder that exists"
        )
    if form.is_folder:
        _check_folder(out, force=force)
    else:
        _check_file(out, force=force)
    return out


def _check_file(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; choose another --out")
    if path.exists() and not force and not _is_our_gguf(path):
        raise UserError(
            f"{path} exists and is no export of this command; choose another --out or add --force"
        )


def _check_folder(path: Path, *, force: bool) -> None:
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
    return bool(certificate.read(path)["certificates"]) and not certificate.unlisted_files(path)


def readable(name: str) -> str:
    """A file's name as text: in a locale without UTF-8 Python has bytes in it that no JSON file can hold."""
    return os.fsencode(name).decode("utf-8", "replace")


def check_free_space(out: Path, num_bytes: int) -> None:
    """Raises :class:`UserError` where the disk of ``out`` has no room for so many bytes: before hours of work."""
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"writing {out} takes about {num_bytes / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free; "
            "make room, or name another disk by --out"
        )


def set_aside(temporary: Path, out: Path, failed: Certificate) -> UserError:
    """Keep an export that failed its verification beside ``out``, which stays as it is; returns the error to raise.

    The file or folder ``temporary`` is renamed to ``NAME.rejected.gguf`` or ``NAME.rejected``; an earlier one of that
    name goes.
    """
    aside = out.with_name(f"{out.stem}.rejected{out.suffix}")
    if aside.is_dir():
        shutil.rmtree(aside)
    temporary.replace(aside)
    if aside.is_file():
        name = readable(aside.name)
        hashes = {name: failed.sha256[failed.file]}
        certificate.write(aside.parent, dataclasses.replace(failed, file=name, sha256=hashes))
    return UserError(f"export failed verification: {'; '.join(failed.failures)}; kept at {aside}")
