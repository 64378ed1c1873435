"""What every kind of export is asked: which model, on which text it is judged, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minicpm_export.verify.certificate import Certificate, hashes


@dataclass(frozen=True, kw_only=True)
class Request:
    """One export of one Hugging Face folder."""

    folder: Path
    name: str
    """The model's name: the run's, or the folder's."""
    run: Path | None = None
    """The run the folder belongs to; its validation set is the held-out text."""
    text: Path | None = None
    """Held-out text that the user names instead."""
    report: Callable[[str], None] = lambda status: None
    """Told what is being done, for a progress line."""
    show: Callable[[Certificate], None] = lambda certificate: None
    """Given the certificate as soon as it is computed, whatever the verdict."""

    def model_sha256(self) -> dict[str, str]:
        """SHA-256 of the weights that were exported."""
        return hashes(sorted(self.folder.glob("*.safetensors")), self.folder)
