"""A loaded model as its users see it: text in, text out, on any engine. Made by :func:`minicpm_edge.load`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Literal, Self, Unpack, overload

from minicpm_edge.engines.base import Engine, GenerationRequest, Sink, Vocabulary
from minicpm_edge.engines.generation import AsyncGeneration, Generation
from minicpm_edge.engines.sampling_params import SamplingOptions, SamplingParams
from minicpm_edge.errors import UserError
from minicpm_edge.text.chat import Message, encode_chat


class LanguageModel:
    """Chat, generate, stream, tokenize and embed with one model.

    Any number of threads and event loops may share it; the engine decides how many generations run at the same time,
    and the others wait their turn. Use as a context manager, or call :meth:`close`: every method that needs the model
    raises :class:`~minicpm_edge.errors.UserError` after that.
    """

    def __init__(self, engine: Engine, *, name: str) -> None:
        self.name = name
        self._engine = engine
        self._closed = False

    @property
    def backend(self) -> str:
        """The runtime that computes: ``torch``, ``llama_cpp`` or ``onnx``."""
        return self._engine.backend

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.context_length

    @property
    def num_slots(self) -> int:
        """Generations that run at the same time."""
        return self._engine.num_slots

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja chat template, else ChatML if the vocabulary has its tokens, else None."""
        return self._vocabulary.chat_template

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, without a begin token. Only ``special=True`` reads control tokens in it as such.

        Raises:
            UserError: when the model is closed.
        """
        return self._vocabulary.encode(text, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; control tokens have none, and bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: for an id outside the vocabulary, or when the model is closed.
        """
        return self._vocabulary.decode(ids)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation's prompt, ready for the assistant's turn. Content can not forge control tokens.

        Args:
            messages: ``{"role": "system" | "user" | "assistant" | "tool", "content": …}``, the oldest first; the
                content is text, or a list of ``{"type": "text", "text": …}``.

        Raises:
            UserError: when a message is malformed, the template refuses it, the model has neither a chat template nor
                ChatML's tokens, or the model is closed.
        """
        return encode_chat(self._vocabulary, messages, add_generation_prompt=True)

    def text_prompt(self, text: str) -> list[int]:
        """Ids of a plain completion's prompt: ``text`` behind the model's begin token, if it has one.

        Raises:
            UserError: when the model is closed.
        """
        vocabulary = self._vocabulary
        begin = [vocabulary.bos_id] if vocabulary.adds_bos else []
        return begin + vocabulary.encode(text)

    def generate(self, prompt: str, **sampling: Unpack[SamplingOptions]) -> str:
        """Continue ``prompt``: the whole text; the keyword arguments are those of :class:`SamplingParams`.

        Raises:
            UserError: for an empty prompt or one that does not fit the context, a bad setting, a closed model.
        """
        return "".join(self._pieces(prompt, sampling))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **sampling: Unpack[SamplingOptions]
    ) -> str | Iterator[str]:
        """Answer a conversation: the whole text, or its pieces as they come with ``stream=True``.

        Args:
            messages: as :meth:`chat_prompt` takes them.
            stream: whether to return an iterator; leaving it early ends the generation.
            **sampling: the fields of :class:`SamplingParams`.

        Raises:
            UserError: as :meth:`chat_prompt` and :meth:`generate` do.
        """
        pieces = self._pieces(self.chat_prompt(messages), sampling)
        return pieces if stream else "".join(pieces)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Generation:
        """Generate from a text or from ids (as :meth:`chat_prompt` gives), chunk by chunk.

        The request is checked and queued here, before the first chunk is asked for.

        Raises:
            UserError: when the prompt is empty, has ids outside the vocabulary or does not fit the context, and when
                the model is closed (then iteration raises it too).
        """
        return Generation(lambda sink: self.submit(prompt, params, sink), check=self._check_open)

    def astream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> AsyncGeneration:
        """:meth:`stream` for an event loop, which stays free while the engine computes; no thread waits.

        ``async for chunk in lm.astream(…)``; where the loop may be left early, ``async with`` around it.

        Raises:
            UserError: as :meth:`stream` does.
            RuntimeError: outside a running event loop.
        """
        return AsyncGeneration(lambda sink: self.submit(prompt, params, sink), check=self._check_open)

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams | None, sink: Sink
    ) -> GenerationRequest:
        """Check a request and queue it; ``sink`` takes its events in the engine's thread.

        :meth:`stream` and :meth:`astream` are made of this.

        Raises:
            UserError: as :meth:`stream` does.
        """
        ids = self._checked_prompt(prompt)
        request = GenerationRequest(ids, params or SamplingParams(), sink)
        self._engine.submit(request)
        return request

    def embed(self, text: str) -> list[float]:
        """A vector ``(hidden_size,)`` of unit length for ``text``: the mean of the model's final hidden states.

        Raises:
            UserError: for an empty text or one that does not fit the context, an engine that has no hidden states
                (ONNX), states that are not finite (a damaged file), a closed model.
        """
        return self.submit_embedding(text).result()

    def submit_embedding(self, prompt: str | Sequence[int]) -> Future[list[float]]:
        """Queue :meth:`embed` for a text or its ids. The future may be cancelled before its turn.

        Raises:
            UserError: as :meth:`embed` does: for a bad prompt or a closed model here, else in the future.
        """
        return self._engine.embed(self._checked_prompt(prompt))

    def close(self) -> None:
        """Free the model, at once: a generation that is under way ends in an error. A second call does nothing."""
        self._closed = True
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

    def _pieces(self, prompt: str | Sequence[int], sampling: SamplingOptions) -> Iterator[str]:
        chunks = self.stream(prompt, SamplingParams.of(**sampling))
        return (chunk.text for chunk in chunks if chunk.text)

    def _checked_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.text_prompt(prompt) if isinstance(prompt, str) else list(prompt)
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
        return ids
