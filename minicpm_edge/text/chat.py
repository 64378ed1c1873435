"""Conversations as token ids: messages checked, rendered and encoded safely, and the loss mask for training.

A message is ``{"role": …, "content": …}``; the content is text or a list of ``{"type": "text", "text": …}`` parts.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

from minicpm_edge.errors import UserError
from minicpm_edge.text.chat_template import run_template
from minicpm_edge.text.chatml import CHATML_TEMPLATE

Message = Mapping[str, object]

ROLES = ("system", "user", "assistant", "tool")
# Code points that Unicode promises never to assign: sentinels that no message needs.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatTokenizer(Protocol):
    """What encoding a conversation needs of a tokenizer: ours (:mod:`minicpm_edge.text.tokenizer`) or an engine's."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens, text to id."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja template, if the model has one."""

    @property
    def bos_token(self) -> str:
        """Text of the token that begins a document."""

    @property
    def eos_token(self) -> str:
        """Text of the token that ends a document."""

    @property
    def adds_bos(self) -> bool:
        """Whether every text this model reads begins with ``bos_token``."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, look-alikes of special tokens being plain text."""

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token."""


def render(
    messages: Sequence[Message],
    template: str = CHATML_TEMPLATE,
    *,
    add_generation_prompt: bool = False,
    bos_token: str = "<s>",
    eos_token: str = "</s>",
) -> str:
    """The conversation as text. For a model use :func:`encode_chat`: this text can hold forged special tokens.

    Raises:
        UserError: when a message is malformed or the template fails.
    """
    return _render(check_messages(messages), template, add_generation_prompt, bos_token, eos_token)


def _render(
    checked: Sequence[Message], template: str, add_generation_prompt: bool, bos_token: str, eos_token: str
) -> str:
    variables: dict[str, object] = {
        "messages": checked,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "tools": None,
    }
    return run_template(template, variables)


def check_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """A plain copy of ``messages`` with each content joined to one string.

    Raises:
        UserError: naming the first message that is wrong, and how.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise UserError("messages must be a list of {role, content} objects")
    if not messages:
        raise UserError("a conversation needs at least one message")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"message {number} has role {role!r:.50}: it must be one of {', '.join(ROLES)}")
        checked.append({**message, "content": _content_text(message.get("content"), number)})
    return checked


def _content_text(content: object, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(f"message {number}: content must be text or a list of text parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise UserError(f'message {number}: only {{"type": "text", "text": …}} parts are understood')
        texts.append(text)
    return "".join(texts)


def encode_chat(
    tokenizer: ChatTokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation, ready for the model to answer.

    Special tokens come from the template alone: what a message says, even ``<|im_end|>``, stays plain text.

    Raises:
        UserError: when a message is malformed, or the model has no chat template or one that fails.
    """
    ids: list[int] = []
    for piece, special_id, _ in _pieces(tokenizer, messages, add_generation_prompt, None):
        ids.extend(tokenizer.encode(piece) if special_id is None else [special_id])
    return ids


def encode_chat_with_mask(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    encode: Callable[[str], list[int]] | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids of a finished conversation and its loss mask: for each id, whether it counts in the loss as a target.

    What the assistant says counts, and the special token that ends it. The ids are those of :func:`encode_chat`
    without a generation prompt (for a template other than ChatML, of answers without spaces around them).
    ``encode`` replaces ``tokenizer.encode`` by a faster function that gives the same ids.

    Raises:
        UserError: as :func:`encode_chat` does.
    """
    encode = encode or tokenizer.encode
    ids: list[int] = []
    mask: list[bool] = []
    answer_ended = False
    for piece, special_id, spans in _pieces(tokenizer, messages, False, "assistant"):
        if special_id is not None:
            ids.append(special_id)
            mask.append(answer_ended)
            answer_ended = False
            continue
        piece_ids = encode(piece)
        ids.extend(piece_ids)
        mask.extend(_span_mask(tokenizer, encode, piece, piece_ids, spans))
        answer_ended = bool(spans) and spans[-1][1] == len(piece)
    return ids, mask


_Piece = tuple[str, int | None, list[tuple[int, int]]]


def _pieces(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    marked_role: str | None,
) -> list[_Piece]:
    """The rendered conversation, cut at the template's special tokens.

    Each piece is (text, None, spans) or (token, its id, []); ``spans`` are the ranges of ``text`` that messages of
    ``marked_role`` said.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UserError("this model has no chat template: it continues text; use generate instead of chat")
    checked = check_messages(messages)
    every_text = "".join(str(message["content"]) for message in checked)
    free = [mark for mark in NONCHARACTERS if mark not in every_text][:3]
    if len(free) < 3:
        raise UserError("the conversation uses up Unicode's noncharacters, which encoding needs; remove some")
    break_mark, begin_mark, end_mark = free
    pattern = _special_pattern(tuple(tokenizer.special_tokens))

    # A mark is put into each look-alike of a special token in a message, so that after rendering only the template's
    # own special tokens are whole; then the marks go. Templates may trim a content: the marks leave its ends alone.
    def protect(value: object) -> object:
        if isinstance(value, str):
            return pattern.sub(lambda found: found[0][0] + break_mark + found[0][1:], value)
        if isinstance(value, Mapping):
            return {protect(key): protect(item) for key, item in value.items()}
        return [protect(item) for item in value] if isinstance(value, list | tuple) else value

    protected: list[Message] = []
    for message in checked:
        safe = {key: protect(value) for key, value in message.items()}
        if message["role"] == marked_role:
            content = str(safe["content"])
            # Templates other than ChatML may trim what stands between the marks.
            if template != CHATML_TEMPLATE:
                content = content.strip()
            safe["content"] = f"{begin_mark}{content}{end_mark}"
        protected.append(safe)
    text = _render(protected, template, add_generation_prompt, tokenizer.bos_token, tokenizer.eos_token)
    pieces: list[_Piece] = []
    if tokenizer.adds_bos and not text.startswith(tokenizer.bos_token):
        pieces.append((tokenizer.bos_token, tokenizer.special_tokens[tokenizer.bos_token], []))
    for position, part in enumerate(pattern.split(text)):
        if position % 2:
            pieces.append((part, tokenizer.special_tokens[part], []))
            continue
        plain, spans = _unmark(part.replace(break_mark, ""), begin_mark, end_mark)
        if plain or spans:
            pieces.append((plain, None, spans))
    return pieces


def _unmark(text: str, begin_mark: str, end_mark: str) -> tuple[str, list[tuple[int, int]]]:
    """``text`` without its marks, and the ranges that lay between them."""
    plain, spans = "", []
    for position, part in enumerate(re.split(f"{begin_mark}(.*?){end_mark}", text, flags=re.DOTALL)):
        if position % 2:
            spans.append((len(plain), len(plain) + len(part)))
        plain += part
    return plain, spans


def _span_mask(
    tokenizer: ChatTokenizer,
    encode: Callable[[str], list[int]],
    text: str,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
) -> list[bool]:
    """For each token of ``text`` whether it begins inside one of the character ranges ``spans``."""
    mask = [False] * len(ids)
    # The usual case is one answer at the end, behind a few words of template.
    if len(spans) == 1 and spans[0][1] == len(text):
        before = encode(text[: spans[0][0]])
        if ids[: len(before)] == before:
            return [*mask[: len(before)], *[True] * (len(ids) - len(before))]
    if spans:
        sizes = [len(tokenizer.token_bytes(index)) for index in ids]
        # Below zero where the tokenizer puts a space before the text.
        at = len(text.encode()) - sum(sizes)
        starts = [max(0, at + size) for size in accumulate(sizes, initial=0)][: len(ids)]
        for begin, end in spans:
            first, last = (bisect_left(starts, len(text[:edge].encode())) for edge in (begin, end))
            mask[first:last] = [True] * (last - first)
    return mask


@lru_cache(maxsize=8)
def _special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(
        "(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")"
    )
