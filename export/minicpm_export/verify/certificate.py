"""``certificate.json``: what the verification of an export found, one entry for each file that a user loads.

It lies beside an exported file, or inside an exported folder.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minicpm_edge.atomic import write_text
from minicpm_edge.cli.table import format_table
from minicpm_edge.errors import UserError
from minicpm_edge.json_file import read_json
from minicpm_export.verify.compare import Check

FILE_NAME = "certificate.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Everything that is claimed about one exported file."""

    file: str
    """Its name, from the folder that ``certificate.json`` is in."""
    quant: str
    """The type of its weights, as ``Q4_K_M``."""
    num_bytes: int
    """Its size, with the files of weights that belong to it alone."""
    sha256: Mapping[str, str]
    """Hexadecimal SHA-256 of the file and of all that it needs, by name."""
    model: str
    model_sha256: Mapping[str, str]
    """Hexadecimal SHA-256 of the files of weights that it was made from."""
    held_out: str
    """The text of the comparison, in words; empty where no text was needed."""
    checks: tuple[Check, ...]
    other_failures: tuple[str, ...] = ()
    """What is wrong apart from the figures."""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def failures(self) -> list[str]:
        """Why it does not pass; empty when it does."""
        return [line for check in self.checks for line in check.failures()] + list(self.other_failures)

    @property
    def passed(self) -> bool:
        """Whether the file is the model, as far as was looked."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``certificate.json``."""
        entry = asdict(self)
        for check in entry["checks"]:
            limits = check["thresholds"]
            check["thresholds"] = {name: value for name, value in limits.items() if value != math.inf}
        entry["verdict"] = "pass" if self.passed else "fail"
        entry["failures"] = self.failures
        del entry["other_failures"]
        return entry


def package_versions() -> dict[str, str]:
    """Versions of Python, the platform and every package that takes part in exports, where installed."""
    names = ("minicpm-edge", "torch", "gguf", "llama-cpp-python", "onnx", "onnxruntime")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(folder: Path, certificate: Certificate) -> None:
    """Add one certificate to the folder's ``certificate.json``, or replace that file's earlier one. Atomic."""
    document = read(folder)
    document["certificates"][certificate.file] = certificate.to_dict()
    # Infinity and NaN have no form in JSON; as text they stay readable and no figure is lost.
    text = json.dumps(_json_safe(document), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / FILE_NAME, text + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The folder's ``certificate.json``; an empty document where there is none, or where it is not ours."""
    empty: dict[str, Any] = {"format": FORMAT, "certificates": {}}
    path = folder / FILE_NAME
    if not path.is_file():
        return empty
    try:
        document = read_json(path)
    except UserError:
        return empty
    ours = document.get("format") == FORMAT and isinstance(document.get("certificates"), dict)
    return document if ours else empty


def unlisted_files(folder: Path) -> set[str]:
    """The files in a folder, from there, that none of its certificates names: not part of an export of ours."""
    listed = {FILE_NAME}
    for entry in read(folder)["certificates"].values():
        listed.update(entry["sha256"])
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - listed


def table(certificate: Certificate) -> str:
    """The certificate as a table for a terminal."""
    head = ("", "mean KL", "99% KL", "top-1", "perplexity", "fp32's", "max Δlogit")
    rows = [head]
    for check in certificate.checks:
        got = check.measures
        rows.append(
            (
                check.what,
                f"{got.mean_kl:.2e}",
                f"{got.p99_kl:.2e}",
                f"{got.top1_agreement:.2%}",
                f"{got.export_perplexity:.4g}",
                f"{got.reference_perplexity:.4g}",
                f"{got.max_logit_difference:.2e}",
            )
        )
    lines = [format_table(rows, num_left=1)] if certificate.checks else []
    if certificate.checks:
        first = certificate.checks[0]
        lines.append(
            f"{first.measures.num_positions} positions of {certificate.held_out}, in {first.runtime}"
        )
    lines += certificate.notes
    lines.append(f"sha256 {certificate.sha256[certificate.file]}")
    lines += [f"FAILED: {line}" for line in certificate.failures]
    return "\n".join(lines)


def _json_safe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
