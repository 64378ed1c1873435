"""Documents from chunks: a text, or a conversation; what is neither is skipped with its place and a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minicpm_edge.errors import UserError
from minicpm_edge.text.chat import check_messages
from minicpm_training.data.sources import CHAT_FIELD, Chunk, Part


@dataclass(frozen=True, kw_only=True)
class Document:
    """``messages`` where it is a conversation; ``text`` is then what its messages say, joined."""

    text: str
    messages: list[dict[str, object]] | None = None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something left out: where, a reason out of a few, and details."""

    place: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def documents(chunk: Chunk, field: str) -> Iterator[Document | Skipped]:
    """Everything in ``chunk``, in order. ``field`` names the text in JSON lines and tables."""
    for part in chunk.parts:
        if part.kind == "problem":
            yield Skipped(place=_place(part, part.first), reason=str(part.content))
        elif part.kind == "text":
            yield _text_document(part)
        elif part.kind == "rows":
            for number, row in enumerate(part.content, part.first):
                assert isinstance(row, Mapping)
                yield _row_document(row, field, _place(part, number))
        else:
            assert isinstance(part.content, bytes)
            for number, line in enumerate(part.content.split(b"\n"), part.first):
                if line.strip():
                    yield _line_document(line, field, _place(part, number))


def _place(part: Part, number: int) -> str:
    return f"{part.place}:{number}" if number else part.place


def _text_document(part: Part) -> Document | Skipped:
    assert isinstance(part.content, bytes)
    place = _place(part, 0 if part.first == 1 else part.first)
    try:
        text = part.content.decode("utf-8-sig" if part.first == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return Skipped(place=place, reason="not UTF-8 text", detail=f"byte {error.start}")
    return Document(text=text) if text.strip() else Skipped(place=place, reason="empty")


def _line_document(line: bytes, field: str, place: str) -> Document | Skipped:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Skipped(place=place, reason="not UTF-8 text", detail=f"byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Skipped(place=place, reason="not valid JSON", detail=str(error)[:100])
    if not isinstance(row, dict):
        return Skipped(place=place, reason="not a JSON object")
    return _row_document(row, field, place)


def _row_document(row: Mapping[str, Any], field: str, place: str) -> Document | Skipped:
    if row.get(CHAT_FIELD) is not None:
        return _conversation(row[CHAT_FIELD], place)
    text = row.get(field)
    if text is None:
        return Skipped(place=place, reason=f"no field {field!r}", detail=f"it has {', '.join(row)}"[:100])
    if not isinstance(text, str):
        return Skipped(place=place, reason=f"field {field!r} is not text", detail=type(text).__name__)
    if not text.strip():
        return Skipped(place=place, reason="empty")
    return Document(text=text) if _is_unicode(text) else Skipped(place=place, reason="half a surrogate pair")


def _conversation(messages: Any, place: str) -> Document | Skipped:
    try:
        checked = check_messages(messages)
    except UserError as error:
        return Skipped(place=place, reason="not a conversation", detail=str(error)[:100])
    if not any(message["role"] == "assistant" and message["content"] for message in checked):
        return Skipped(place=place, reason="a conversation without an answer")
    text = "".join(str(message["content"]) for message in checked)
    if not _is_unicode(text):
        return Skipped(place=place, reason="half a surrogate pair")
    return Document(text=text, messages=checked)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell ``text``: JSON can hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
