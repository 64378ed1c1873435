"""The certificate: what an export's predictions cost against the fp32 torch model, and whether that is acceptable.

It is computed by the runtime that users will use, reading the exported file. ``certificate.json`` beside an export
holds one entry for each exported file of that folder.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.atomic import write_text
from minicpm_edge.cli.table import format_table
from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import sha256
from minicpm_edge.json_file import read_json
from minicpm_export.verify.measures import Comparison, Measures
from minicpm_export.verify.windows import Window

FILE_NAME = "certificate.json"
FORMAT = 1


class Runtime(Protocol):
    """Something that computes logits (T, V), float32, for the token ids of one window."""

    @property
    def name(self) -> str: ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]: ...


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The worst that passes; KL in nats. A figure that is not a number never passes.

    ``max_logit_difference`` holds for logits that spread by 1; where the model's spread more it grows with them, since
    so does the rounding of fp32 (llama.cpp's rotary angles drift with the position, the largest part of it).
    """

    mean_kl: float
    p99_kl: float
    top1_agreement: float
    max_logit_difference: float = math.inf


# Lossless forms must be the same function. The others are many times what trained models measure (Q4_K_M: a 4M model
# 0.003, an 8B one 0.03), with room for weights hardly trained, which suffer most: a broken file fails and honest
# rounding does not. A wrong map of a quantised file is caught by F32's limits; what rounding costs is in the figures.
THRESHOLDS: Mapping[str, Thresholds] = {
    "exact": Thresholds(mean_kl=0.0, p99_kl=0.0, top1_agreement=1.0, max_logit_difference=0.0),
    "F32": Thresholds(mean_kl=1e-5, p99_kl=1e-4, top1_agreement=0.99, max_logit_difference=1e-3),
    "F16": Thresholds(mean_kl=5e-3, p99_kl=0.05, top1_agreement=0.97),
    "BF16": Thresholds(mean_kl=0.02, p99_kl=0.3, top1_agreement=0.95),
    "Q8_0": Thresholds(mean_kl=0.05, p99_kl=0.8, top1_agreement=0.92),
    "INT8": Thresholds(mean_kl=0.05, p99_kl=0.8, top1_agreement=0.92),
    "Q6_K": Thresholds(mean_kl=0.1, p99_kl=1.0, top1_agreement=0.88),
    "Q5_K_M": Thresholds(mean_kl=0.15, p99_kl=1.2, top1_agreement=0.82),
    "Q4_K_M": Thresholds(mean_kl=0.3, p99_kl=2.0, top1_agreement=0.70),
    "Q4_0": Thresholds(mean_kl=0.5, p99_kl=3.0, top1_agreement=0.65),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: what was compared, in which runtime, the figures, and what they had to meet."""

    what: str
    runtime: str
    measures: Measures
    thresholds: Thresholds

    def failures(self) -> list[str]:
        """Which figures are past their threshold, in words; empty when all are met."""
        got, limit = self.measures, self.thresholds
        worst = [
            ("mean KL", got.mean_kl, limit.mean_kl),
            ("99th-percentile KL", got.p99_kl, limit.p99_kl),
            (
                "largest logit difference",
                got.max_logit_difference,
                limit.max_logit_difference * max(1.0, got.logit_std),
            ),
        ]
        found = [f"{name} {value:.3g} (limit {most:.3g})" for name, value, most in worst if not value <= most]
        if not got.top1_agreement >= limit.top1_agreement:
            found.append(f"top-1 agreement {got.top1_agreement:.1%} (limit {limit.top1_agreement:.0%})")
        return [f"{self.what}: {line}" for line in found]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Everything that is claimed about one export."""

    file: str
    quant: str
    num_bytes: int
    sha256: Mapping[str, str]
    model: str
    model_sha256: Mapping[str, str]
    held_out: str
    checks: tuple[Check, ...]
    other_failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def failures(self) -> list[str]:
        """Why it does not pass; empty when it does."""
        return [line for check in self.checks for line in check.failures()] + list(self.other_failures)

    @property
    def passed(self) -> bool:
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


def compare(
    reference: Runtime, export: Runtime, windows: Sequence[Window], report: Callable[[str], None]
) -> Measures:
    """Both models over the windows, one window's logits in memory at a time."""
    comparison = Comparison()
    for number, window in enumerate(windows, 1):
        report(f"certificate: window {number}/{len(windows)} in {export.name}")
        expected, got = reference.logits(window.ids), export.logits(window.ids)
        comparison.add(expected, got, np.asarray(window.targets))
    return comparison.measures()


def hashes(files: Sequence[Path], root: Path) -> dict[str, str]:
    """SHA-256 of each file by its path from ``root``."""
    return {file.relative_to(root).as_posix(): sha256(file) for file in files}


def package_versions() -> dict[str, str]:
    """Versions of everything that took part."""
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
    lines = [format_table(rows, num_left=1)]
    positions = certificate.checks[0].measures.num_positions
    lines.append(f"{positions} positions of {certificate.held_out}, in {certificate.checks[0].runtime}")
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
