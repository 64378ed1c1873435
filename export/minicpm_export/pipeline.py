"""From a model to a certified export, whatever the format: write, read back, compare, certify, put in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minicpm_edge.atomic import atomic_file, atomic_folder
from minicpm_edge.formats.checkpoint import sha256
from minicpm_export.destination import check_free_space, readable, set_aside
from minicpm_export.format import ExportedFile, Format
from minicpm_export.source import Source
from minicpm_export.verify import certificate
from minicpm_export.verify.certificate import Certificate
from minicpm_export.verify.compare import Check, Runtime, compare
from minicpm_export.verify.windows import Window


def export(
    form: Format,
    source: Source,
    out: Path,
    *,
    report: Callable[[str], None] = lambda status: None,
    show: Callable[[Certificate], None] = lambda made: None,
) -> list[Certificate]:
    """Write ``out`` and its certificates; returns these, one for each file that a user loads.

    Args:
        form: the format, with its options.
        source: the model.
        out: the file or folder to write; what is there is replaced, once the new export has passed.
        report: told what is being done, for a progress line.
        show: given each certificate as soon as it is computed, whatever the verdict.

    Raises:
        UserError: for a model that has no such form, for a disk with too little room, and for an export that fails
            its verification. That one is kept beside ``out`` under another name; what was at ``out`` stays.
    """
    text = source.held_out()
    check_free_space(out, form.disk_bytes(source))
    certificates: list[Certificate] = []
    atomic = atomic_folder if form.is_folder else atomic_file
    with atomic(out) as temporary, _scratch_folder(temporary) as scratch:
        form.write(source, temporary, scratch, report)
        files = form.exported(source, temporary, scratch)
        assert files, f"{form} names no file that it has written"
        # The reference is the whole model in fp32: loaded after the writing, and only where it is compared with.
        reference = source.reference() if any(file.read_backs for file in files) else None
        model_sha256 = source.weights_sha256()
        for file in files:
            assert file.path in file.files, f"{form} lists {file.path.name} without its size and hash"
            checks = _compare(file, reference, text.windows, report) if reference is not None else ()
            made = Certificate(
                file=_name(file.path, temporary, out),
                quant=file.quant,
                num_bytes=sum(path.stat().st_size for path in file.files),
                sha256={
                    _name(path, temporary, out): sha256(path) for path in (*file.files, *file.shared_files)
                },
                model=source.name,
                model_sha256=model_sha256,
                held_out=text.name if checks else "",
                checks=checks,
                other_failures=tuple(file.failures),
                notes=tuple(file.notes),
            )
            certificates.append(made)
            if form.is_folder:
                certificate.write(temporary, made)
            show(made)
        if form.is_folder:  # else the next export could not tell this one from a folder of the user's own
            assert not (missed := certificate.unlisted_files(temporary)), f"{form} does not name {missed}"
        for made in certificates:
            if not made.passed:
                raise set_aside(temporary, out, made)
    if not form.is_folder:
        certificate.write(out.parent, certificates[0])
    return certificates


def _name(path: Path, temporary: Path, out: Path) -> str:
    """The name of an exported file in the certificate: its path in the folder, or its final name."""
    return readable(out.name if path == temporary else path.relative_to(temporary).as_posix())


def _compare(
    file: ExportedFile, reference: Runtime, windows: Sequence[Window], report: Callable[[str], None]
) -> tuple[Check, ...]:
    """One check for each way to read the file back."""
    checks = []
    for read_back in file.read_backs:
        compared = windows[:1] if read_back.first_window_only else windows
        with read_back.open(max(len(window.ids) for window in compared)) as runtime:
            measures = compare(reference, runtime, compared, report)
            checks.append(
                Check(
                    what=read_back.what,
                    runtime=runtime.name,
                    measures=measures,
                    thresholds=read_back.thresholds,
                )
            )
    return tuple(checks)


@contextmanager
def _scratch_folder(temporary: Path) -> Iterator[Path]:
    """An empty folder beside ``temporary``, named so that after a kill it is cleared away together with that one."""
    scratch = temporary.with_name(temporary.name + ".scratch")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
