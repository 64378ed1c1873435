"""Response schemas: completions whole and in chunks, field by field as OpenAI's API gives them."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from minicpm_edge.engines.base import Chunk, FinishReason

Json = dict[str, object]


def usage(chunk: Chunk) -> Json:
    """Tokens read and written up to ``chunk``."""
    return {
        "prompt_tokens": chunk.num_prompt_tokens,
        "completion_tokens": chunk.num_completion_tokens,
        "total_tokens": chunk.num_prompt_tokens + chunk.num_completion_tokens,
    }


class CompletionSchema(Protocol):
    """The shape in which one route gives generated text."""

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        """The complete response as one object."""

    def opening(self) -> Json | None:
        """The chunk before any text, where the route has one."""

    def piece(self, text: str) -> Json:
        """A chunk of text."""

    def ending(self, finish_reason: FinishReason | None) -> Json:
        """The chunk that tells why the text ends."""

    def usage(self, last: Chunk) -> Json:
        """The chunk after the last, with no choice in it, that counts tokens."""


@dataclass(frozen=True, kw_only=True)
class _Common:
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


class ChatCompletion(_Common):
    """``/v1/chat/completions``."""

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        last = chunks[-1]
        message = {"role": "assistant", "content": _text(chunks), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(last)}

    def opening(self) -> Json | None:
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def piece(self, text: str) -> Json:
        return self._chunk({"content": text})

    def ending(self, finish_reason: FinishReason | None) -> Json:
        return self._chunk({}, finish_reason)

    def usage(self, last: Chunk) -> Json:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(last)}

    def _chunk(self, delta: Json, finish_reason: FinishReason | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> Json:
        return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}


class TextCompletion(_Common):
    """``/v1/completions``: chunks and whole responses have the same shape."""

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        return {**self._chunk(_text(chunks), chunks[-1].finish_reason), "usage": usage(chunks[-1])}

    def opening(self) -> Json | None:
        return None

    def piece(self, text: str) -> Json:
        return self._chunk(text)

    def ending(self, finish_reason: FinishReason | None) -> Json:
        return self._chunk("", finish_reason)

    def usage(self, last: Chunk) -> Json:
        return {**self._head(), "choices": [], "usage": usage(last)}

    def _chunk(self, text: str, finish_reason: FinishReason | None = None) -> Json:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head(), "choices": [choice]}

    def _head(self) -> Json:
        return {
            "id": f"cmpl-{self.id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


def embedding_list(vectors: Sequence[tuple[list[float], int]], *, model: str, as_base64: bool) -> Json:
    """``/v1/embeddings``: each vector with its text's number of tokens. Base64 is of little-endian float32."""
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_base64 else vector}
        for index, (vector, _) in enumerate(vectors)
    ]
    num_tokens = sum(count for _, count in vectors)
    counts = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": counts}


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def _text(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
