"""ChatML: the chat template of the models trained here, and of models that have its tokens but bring no template."""

from __future__ import annotations

from collections.abc import Container

IM_START, IM_END = CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# ChatML with the beginning of text, written so that `transformers` and llama.cpp give the same string. The loop
# over parts is for runtimes that pass a list of parts to the template; here contents are joined before.
CHATML_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def chatml_for(special_tokens: Container[str]) -> str | None:
    """ChatML where its tokens exist, else None: such a model continues text and cannot chat."""
    if not all(token in special_tokens for token in CHATML_TOKENS):
        return None
    # Without the begin token, which is added where the vocabulary asks for it; in some it is <|im_start|> itself.
    return CHATML_TEMPLATE.removeprefix("{{- bos_token }}")
