"""How a model's text begins and ends, and the sampling its authors recommend: the one place that decides.

Engines stop by it, and every export carries it on: a Hugging Face folder, a GGUF, onnxruntime-genai's settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_edge.json_file import read_json
from minicpm_edge.text.tokenizer import PAD, Tokenizer

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# Settings of sampling, by their names in generation_config.json → the kinds of value that they may have.
SAMPLING: Mapping[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
}


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What a folder says of generating text."""

    bos_id: int
    """The token that begins a text."""
    stop_ids: tuple[int, ...]
    """Every token that ends an answer: those the folder names, in its order, then those of the tokenizer."""
    pad_id: int | None
    """The token that fills up short sequences of a batch, where there is one."""
    sampling: Mapping[str, Any]
    """Recommended sampling, by the names of :data:`SAMPLING`; what the folder does not say is not in it."""
    named: Mapping[str, Any]
    """The folder's generation_config.json as it stands."""

    def to_dict(self) -> dict[str, object]:
        """The content of a generation_config.json: the folder's own, with begin and ends as decided here."""
        decided: dict[str, object] = {"bos_token_id": self.bos_id, "eos_token_id": list(self.stop_ids)}
        if self.pad_id is not None:
            decided["pad_token_id"] = self.pad_id
        return {**self.named, **decided}


def read_generation(folder: Path, tokenizer: Tokenizer) -> GenerationSettings:
    """The settings of a model folder.

    An answer ends at every token that generation_config.json or config.json names, at the tokenizer's end of text,
    and at the end of a turn. Ids that the tokenizer does not have, and values of the wrong kind, are left out.

    Raises:
        UserError: for a file that is not JSON.
    """
    named = read_json(folder / GENERATION_CONFIG, missing_ok=True)
    config = read_json(folder / CONFIG, missing_ok=True)
    known = tokenizer.vocab_size
    ends = [token for settings in (named, config) for token in _ids(settings.get("eos_token_id"), known)]
    pads = [*_ids(named.get("pad_token_id"), known), *_ids(config.get("pad_token_id"), known)]
    if PAD in tokenizer.special_tokens:
        pads.append(tokenizer.special_tokens[PAD])
    return GenerationSettings(
        bos_id=tokenizer.bos_id,
        stop_ids=tuple(dict.fromkeys((*ends, tokenizer.eos_id, tokenizer.im_end_id))),
        pad_id=pads[0] if pads else None,
        sampling={name: value for name, value in named.items() if _is_setting(name, value)},
        named=named,
    )


def _ids(value: object, vocab_size: int) -> Iterator[int]:
    """Token ids out of one id or a list of them."""
    for token in value if isinstance(value, list) else [value]:
        if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size:
            yield token


def _is_setting(name: str, value: object) -> bool:
    kinds = SAMPLING.get(name, ())
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
