"""What an export format has to say for itself; :mod:`minicpm_export.pipeline` does the rest.

A format writes, and names what it has written: the files, and how each is read back by the runtime that its users
will use. It neither compares nor certifies nor puts anything in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from minicpm_export.source import Source
from minicpm_export.verify.compare import Runtime, Thresholds


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """One way to read an exported file back, to be compared with the source position by position."""

    what: str
    """The line's name in the certificate."""
    thresholds: Thresholds
    """The worst figures that pass."""
    open: Callable[[int], AbstractContextManager[Runtime]]
    """Opens the runtime for windows of at most so many tokens."""
    first_window_only: bool = False
    """For what needs no more than a spot check beside the comparison over all windows."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One file that a user loads, with everything that its certificate says of it."""

    path: Path
    """The file, by whose name its certificate goes."""
    quant: str
    """The type of its weights."""
    files: Sequence[Path]
    """All files that only this one needs, itself among them: they make up its size."""
    shared_files: Sequence[Path] = ()
    """Further files that it needs and others need too. Each file in both lists gets its SHA-256 in the certificate."""
    read_backs: Sequence[ReadBack] = ()
    """What is compared with the source over held-out text; the first is the one that figures are quoted from."""
    failures: Sequence[str] = ()
    """What is wrong with it apart from the figures, in words; any of them fails the export."""
    notes: Sequence[str] = ()
    """What a user should know of it, one line each."""


class Format(Protocol):
    """A form in which a model leaves this program. One object is one choice of its options."""

    is_folder: ClassVar[bool]
    """Whether the export is a folder with its certificates inside, or one file with its certificate beside it."""

    def file_name(self, model: str) -> str:
        """What an export of the model of that name is called unless the user says otherwise."""
        ...

    def disk_bytes(self, source: Source) -> int:
        """About how many bytes writing takes on the disk at its peak, intermediate files included."""
        ...

    def write(self, source: Source, out: Path, scratch: Path, report: Callable[[str], None]) -> None:
        """Write the export.

        Args:
            source: the model.
            out: an empty folder, or the name of a file to write. It is moved to its place later.
            scratch: an empty folder on the same disk, removed once the export has been compared.
            report: told what is being written, for a progress line.

        Raises:
            UserError: for a model that this format cannot express.
        """
        ...

    def exported(self, source: Source, out: Path, scratch: Path) -> Sequence[ExportedFile]:
        """What :meth:`write` has written, given the same paths: at least one file that a user loads."""
        ...
