"""The tokenizer and chat template inside a GGUF, as llama.cpp runs them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from minicpm_edge.engines.llama_cpp.library import llama
from minicpm_edge.errors import UserError
from minicpm_edge.text.chatml import chatml_for

_PIECE_BYTES = 64
_CONTROL = llama.LLAMA_TOKEN_ATTR_CONTROL
_USER_DEFINED = llama.LLAMA_TOKEN_ATTR_USER_DEFINED
_MARKER = re.compile(r"<.+>|\[.+\]", re.DOTALL)


class LlamaVocabulary:
    """:class:`~minicpm_edge.engines.base.Vocabulary` over a ``llama_vocab``; valid while its model is loaded."""

    def __init__(self, model: Any) -> None:
        self._vocab: Any = llama.llama_model_get_vocab(model)
        template: bytes | None = llama.llama_model_chat_template(model, None)
        self._template = template.decode("utf-8", errors="replace") if template else None
        self.vocab_size: int = llama.llama_vocab_n_tokens(self._vocab)
        self.bos_id: int = llama.llama_vocab_bos(self._vocab)
        self.adds_bos: bool = self.bos_id >= 0 and llama.llama_vocab_get_add_bos(self._vocab)
        self.bos_token = self._text(self.bos_id)
        self.eos_token = self._text(llama.llama_vocab_eos(self._vocab))

    @cached_property
    def chat_template(self) -> str | None:
        """``tokenizer.chat_template`` of the file, else ChatML where its tokens exist."""
        return self._template or chatml_for(self.special_tokens)

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens, and user-defined ones that look like markers (``<|assistant|>``), text to id."""
        begin = {self.bos_token: self.bos_id} if self.bos_token else {}
        return begin | self._markers(_CONTROL) | self._markers(_USER_DEFINED)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Every end-of-generation token llama.cpp knows for this file."""
        is_end = llama.llama_vocab_is_eog
        return frozenset(token for token in range(self.vocab_size) if is_end(self._vocab, token))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """See :meth:`minicpm_edge.engines.base.Vocabulary.encode`."""
        if special or not self._found_in_text:
            return self._encode(text, special)
        # llama.cpp finds user-defined tokens in plain text too; cut behind its first character, none is whole.
        cuts = [0, *(found.start() + 1 for found in self._found_in_text.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        return [token for part in parts for token in self._encode(part, False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See :meth:`minicpm_edge.engines.base.Vocabulary.decode`."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._adds_space and ids else text

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token; empty for control tokens."""
        if not 0 <= index < self.vocab_size:  # llama.cpp would abort the process
            raise UserError(f"token id {index} is not in the vocabulary of {self.vocab_size}")
        return self._piece(index, special=False)

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before a text (SentencePiece), which decoding takes away again."""
        return b"".join(map(self.token_bytes, self._encode("a", False))).startswith(b" ")

    def _markers(self, kind: int) -> dict[str, int]:
        attributes = llama.llama_vocab_get_attr
        found = (token for token in range(self.vocab_size) if attributes(self._vocab, token) & kind)
        texts = {self._text(token): token for token in found}
        if kind == _USER_DEFINED:  # others are words that some vocabularies add, runs of spaces for one
            return {text: token for text, token in texts.items() if _MARKER.fullmatch(text)}
        return {text: token for text, token in texts.items() if text}

    @cached_property
    def _found_in_text(self) -> re.Pattern[str] | None:
        markers = sorted(self._markers(_USER_DEFINED), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, markers))) if markers else None

    def _encode(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        capacity = len(data) + 2
        while True:
            ids = (llama.llama_token * capacity)()
            count: int = llama.llama_tokenize(self._vocab, data, len(data), ids, capacity, False, special)
            if count >= 0:
                return list(ids[:count])
            capacity = -count

    def _text(self, token: int) -> str:
        return self._piece(token, special=True).decode("utf-8", errors="replace") if token >= 0 else ""

    def _piece(self, token: int, *, special: bool) -> bytes:
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            length: int = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length
