"""The chat template of models that bring none."""

from __future__ import annotations

from collections.abc import Container

from minicpm_edge.text.chat import CHATML_TEMPLATE

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def chatml_for(special_tokens: Container[str]) -> str | None:
    """ChatML where its tokens exist, else None: such a model continues text and cannot chat."""
    if not all(token in special_tokens for token in CHATML_TOKENS):
        return None
    # Without the begin token, which is added where the vocabulary asks for it; in some it is <|im_start|> itself.
    return CHATML_TEMPLATE.removeprefix("{{- bos_token }}")
