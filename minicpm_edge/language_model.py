"""A loaded model as its users see it: text in, text out, on any engine. Made by :func:`minicpm_edge.load`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Literal, Self, overload

from minicpm_edge.engines.base import (
    Cancelled,
    Chunk,
    Engine,
    FinishReason,
    SamplingParams,
    Vocabulary,
    never_cancelled,
)
from minicpm_edge.errors import UserError
from minicpm_edge.text.chat import Message, encode_chat
from minicpm_edge.text.detokenizer import TextStream

POLL_SECONDS = 0.05


class LanguageModel:
    """Chat, generate, stream, tokenize and embed with one model.

    Threads may share it: one generation runs at a time and the others wait. A stream has the model until it is
    exhausted or closed (leaving a ``for`` loop closes it), and stays in the thread that began it. Use as a context
    manager, or call :meth:`close`.
    """

    def __init__(self, engine: Engine, *, name: str) -> None:
        self.name = name
        self._engine = engine
        self._turn = threading.Lock()  # held for a whole generation
        self._turn_of: int | None = None  # the thread that holds it
        self._computing = (
            threading.Lock()
        )  # held while the engine works, so that close() need not wait for a reader
        self._closed = False

    @property
    def kind(self) -> str:
        """The engine: ``torch``, ``llama_cpp`` or ``onnx``."""
        return self._engine.kind

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.context_length

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja chat template, if it ships one."""
        return self._vocabulary.chat_template

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, without a begin token. Only ``special=True`` reads control tokens in it as such."""
        return self._vocabulary.encode(text, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; control tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode(ids)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a conversation, ready for the assistant's turn. Content can not forge control tokens.

        Raises:
            UserError: when a message is malformed, or the model has neither a chat template nor ChatML's tokens.
        """
        return encode_chat(self._vocabulary, messages, add_generation_prompt=True)

    def text_prompt(self, text: str) -> list[int]:
        """The prompt of a plain completion: ``text`` behind the model's begin token."""
        vocabulary = self._vocabulary
        begin = [vocabulary.bos_id] if vocabulary.adds_bos else []
        return begin + vocabulary.encode(text)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        cancelled: Cancelled = never_cancelled,
    ) -> Iterator[Chunk]:
        """Generate from a text or from ids (as :meth:`chat_prompt` gives), chunk by chunk.

        The checks happen here, before the first chunk is asked for. Waiting for another thread's generation ends when
        ``cancelled`` says so.

        Raises:
            UserError: when the prompt is empty or does not fit the context.
        """
        params = params or SamplingParams()
        ids = self.text_prompt(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_prompt(ids)
        return self._stream(ids, params, cancelled)

    def generate(self, prompt: str, **sampling: Any) -> str:
        """Continue ``prompt``; the keyword arguments are those of :class:`SamplingParams`."""
        return "".join(self._pieces(prompt, sampling))

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **sampling: Any
    ) -> str: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **sampling: Any
    ) -> Iterator[str]: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **sampling: Any
    ) -> str | Iterator[str]:
        """Answer a conversation: the whole text, or its pieces as they come with ``stream=True``."""
        pieces = self._pieces(self.chat_prompt(messages), sampling)
        return pieces if stream else "".join(pieces)

    def embed(self, text: str) -> list[float]:
        """A vector of unit length for ``text``: the mean of the model's final hidden states."""
        ids = self.text_prompt(text)
        self._check_prompt(ids)
        with self._take_turn(never_cancelled), self._compute():
            return self._engine.embed(ids)

    def close(self) -> None:
        """Free the model, at once: a generation that is under way in another thread ends in an error."""
        self._closed = True
        with self._computing:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _vocabulary(self) -> Vocabulary:
        self._check_open()
        return self._engine.vocabulary

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(f"the model {self.name} is closed; load it again")

    def _pieces(self, prompt: str | Sequence[int], sampling: Mapping[str, Any]) -> Iterator[str]:
        chunks = self.stream(prompt, SamplingParams.of(**sampling))
        return (chunk.text for chunk in chunks if chunk.text)

    def _stream(self, ids: list[int], params: SamplingParams, cancelled: Cancelled) -> Iterator[Chunk]:
        budget = min(params.max_tokens or self.context_length, self.context_length - len(ids))
        vocabulary, end_ids, text = self._vocabulary, self._engine.end_ids, TextStream(params.stop)
        with self._take_turn(cancelled) as mine:
            tokens = self._tokens(ids, params, cancelled) if mine else iter(())
            for count, token in enumerate(tokens, start=1):
                finish: FinishReason | None = None
                if token in end_ids:
                    piece, finish = text.finish(), "stop"
                else:
                    piece = text.push(vocabulary.token_bytes(token))
                    if text.stopped:
                        finish = "stop"
                    elif count == budget:
                        piece, finish = piece + text.finish(cut=True), "length"
                if piece or finish:
                    yield Chunk(
                        text=piece,
                        finish_reason=finish,
                        num_prompt_tokens=len(ids),
                        num_completion_tokens=count,
                    )
                if finish:
                    return

    def _tokens(self, ids: list[int], params: SamplingParams, cancelled: Cancelled) -> Iterator[int]:
        """The engine's tokens until cancelled; an error once the model is closed."""
        with closing(self._engine.tokens(ids, params, lambda: self._closed or cancelled())) as tokens:
            while True:
                with self._compute():
                    token = next(tokens, None)
                    self._check_open()
                if token is None:
                    return
                yield token

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UserError("the prompt is empty; give at least one token of text")
        size = self._vocabulary.vocab_size
        if not all(isinstance(token, int) and 0 <= token < size for token in ids):
            raise UserError(
                f"the prompt has ids outside the vocabulary; give whole numbers from 0 to {size - 1}"
            )
        if len(ids) >= self.context_length:
            raise UserError(
                f"the prompt is {len(ids)} tokens and the context holds {self.context_length}, answer included; "
                "shorten the prompt, or load the model with a larger context_length if it allows one"
            )

    @contextmanager
    def _take_turn(self, cancelled: Cancelled) -> Iterator[bool]:
        """Wait for the generations of other threads; False when cancelled while waiting."""
        if self._turn_of == threading.get_ident():  # waiting for oneself would be for ever
            raise UserError("a stream of this model is still open in this thread; finish or close it first")
        while not self._turn.acquire(timeout=POLL_SECONDS):
            self._check_open()
            if cancelled():
                yield False
                return
        self._turn_of = threading.get_ident()
        try:
            yield True
        finally:
            self._turn_of = None
            self._turn.release()

    @contextmanager
    def _compute(self) -> Iterator[None]:
        with self._computing:
            self._check_open()
            yield
