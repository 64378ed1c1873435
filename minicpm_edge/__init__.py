"""minicpm-edge: from text to a small language model that answers on its owner's laptop or phone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Importing this costs nothing: `load` imports what a model needs when it is called. It is bound here, at once, because
# the function bears its module's name: bound later, either could hide the other.
from minicpm_edge.load import load

if TYPE_CHECKING:
    from minicpm_edge.engines.sampling_params import SamplingParams
    from minicpm_edge.errors import UserError
    from minicpm_edge.language_model import LanguageModel

__all__ = ["LanguageModel", "SamplingParams", "UserError", "load"]

_LAZY = {
    "LanguageModel": "minicpm_edge.language_model",
    "SamplingParams": "minicpm_edge.engines.sampling_params",
    "UserError": "minicpm_edge.errors",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
