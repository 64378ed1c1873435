"""What was read and what was skipped: nothing is dropped without a count and a place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MAX_EXAMPLES = 20  # places kept for each reason; the count goes on


@dataclass
class Report:
    """Counts of one pass over the sources. ``skipped`` counts rows and files by reason."""

    documents: int = 0
    chats: int = 0
    text_bytes: int = 0
    files: Counter[str] = field(default_factory=Counter)  # documents by file
    skipped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, place: str) -> None:
        """Count one row or file that is left out."""
        self.skipped[reason] += 1
        examples = self.places.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(place)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {
            "documents": self.documents,
            "chats": self.chats,
            "text_bytes": self.text_bytes,
            "files": dict(self.files),
            "skipped": {
                reason: {"count": count, "places": self.places[reason]}
                for reason, count in self.skipped.items()
            },
        }

    def lines(self) -> list[str]:
        """What was skipped, a line each, for a person."""
        return [
            f"skipped {count}: {reason} ({', '.join(self.places[reason][:3])}{', …' if count > 3 else ''})"
            for reason, count in self.skipped.most_common()
        ]
