"""The door to a loaded model: a request goes in, its events come out.

``Engine.submit`` returns at once. From then on the engine's own thread hands the request's events to its sink: one
:class:`Started`, any number of :class:`Chunk`, one :class:`Ended`. Whoever waits for text, a loop in the library or a
client of the server, sees nothing else of an engine, so one that computes many requests in a batch can stand behind
the same door as one that computes them in turn (:mod:`minicpm_edge.engines.sequential`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.errors import UserError
from minicpm_edge.text.chat import ChatTokenizer

FinishReason = Literal["stop", "length"]
Cancelled = Callable[[], bool]
"""Polled between tokens and within a prompt; True ends the generation."""


@dataclass(frozen=True)
class Started:
    """The engine has begun with the request; its prompt is read next."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of generated text. The last one carries ``finish_reason``; a cancelled generation has none."""

    text: str
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_completion_tokens: int
    """Tokens generated so far, the stop token included."""


@dataclass(frozen=True)
class Ended:
    """The last event: the engine has let go of the request."""

    error: Exception | None = None
    """What went wrong; None where the text is complete or was cancelled."""


Event = Started | Chunk | Ended
Sink = Callable[[Event], None]
"""Takes a request's events in the engine's thread: it must return at once and raise nothing."""


class GenerationRequest:
    """A prompt to continue, and where its events go. Any thread may cancel it, and so may a signal handler."""

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams, sink: Sink) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.params = params
        self.deliver = sink
        self.cancelled = False

    def cancel(self) -> None:
        """Ask the engine to let go: before the request's turn, within its prompt, or at its next token."""
        self.cancelled = True


class Vocabulary(ChatTokenizer, Protocol):
    """Text to ids and back, as the model's own tokenizer does it; what chats need is in ``ChatTokenizer``."""

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""

    @property
    def bos_id(self) -> int:
        """Id of ``bos_token``; it counts only where ``adds_bos``."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, without a begin token; look-alikes of special tokens are text unless ``special``."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out; invalid bytes become U+FFFD."""


class Model(Protocol):
    """What is known of a loaded model before it is asked anything. Safe to use from any thread."""

    @property
    def backend(self) -> str:
        """``torch``, ``llama_cpp`` or ``onnx``."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokenizer and chat template."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation: end of text, end of turn."""


class Engine(Model, Protocol):
    """A model that takes requests from any thread and computes them in a thread of its own."""

    @property
    def num_slots(self) -> int:
        """Generations that run at the same time; more wait, first come, first served."""

    def submit(self, request: GenerationRequest) -> None:
        """Queue ``request`` and return. Its prompt has a token at least and leaves room for one more.

        Raises:
            UserError: when the engine is closed.
        """

    def embed(self, prompt_ids: Sequence[int]) -> Future[list[float]]:
        """Queue an embedding: the mean of the final hidden states, scaled to unit length, ``(hidden_size,)``.

        Raises:
            UserError: when the engine is closed; the future raises what the computation raised.
        """

    def close(self) -> None:
        """Free the model at once. Requests under way or waiting end in an error. Calling it again does nothing."""


class ModelRunner(Model, Protocol):
    """A model in one runtime, one sequence at a time: what a new backend implements. Used from one thread."""

    def tokens(self, prompt: Sequence[int], params: SamplingParams, cancelled: Cancelled) -> Generator[int]:
        """Sampled ids, one after another, stop tokens included, until the context is full or ``cancelled``.

        Nothing is computed ahead of the token asked for.
        """

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """See :meth:`Engine.embed`."""

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""


def resolve_context_length(
    asked: int | None, trained: int, model: object, *, default: int | None = None
) -> int:
    """The context length to run with, in tokens: what is ``asked`` for, else the trained one (at most ``default``).

    Raises:
        UserError: when more is asked for than ``model`` was trained for; its answers would be noise.
    """
    if asked is not None and asked > trained:
        raise UserError(
            f"context_length {asked} is more than {model} was trained for; ask for at most {trained}"
        )
    return asked or min(trained, default or trained)
