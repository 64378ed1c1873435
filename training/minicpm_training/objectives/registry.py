"""Every objective by its ``objective.kind``."""

from __future__ import annotations

from minicpm_training.objectives.base import ObjectiveKind
from minicpm_training.objectives.next_token import NextToken

OBJECTIVES: dict[str, ObjectiveKind] = {"next-token": NextToken()}
