"""Chat in a terminal, or through a pipe: one line in, one answer out, streamed."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

from minicpm_edge.engines.base import Chunk
from minicpm_edge.engines.generation import Generation
from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.errors import UserError
from minicpm_edge.interrupts import on_interrupt
from minicpm_edge.language_model import LanguageModel

HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt and start again (without TEXT: none)
/help           this list
/exit           leave (or Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ continues in the next."""
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

Turn = dict[str, object]


@dataclass(kw_only=True)
class Conversation:
    """The turns so far and how to answer the next."""

    model: LanguageModel
    params: SamplingParams
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    stopped: bool = False
    """Whether the last answer was called off."""
    _generation: Generation | None = None

    def reset(self, system: str | None) -> None:
        """Start again, under another system prompt."""
        self.system, self.turns = system, []

    def ask(self, text: str) -> Iterator[Chunk]:
        """The answer, chunk by chunk; both turns are kept once it ends, or is stopped midway.

        Where the conversation no longer fits the context, the oldest turns are left out of the prompt (and of
        ``turns``).

        Raises:
            UserError: when even the last question alone does not fit.
        """
        self.stopped = False
        turns = [*self.turns, _turn("user", text)]
        prompt = self._prompt(turns)
        while len(prompt) >= self.model.context_length and len(turns) > 2:
            del turns[:2]
            prompt = self._prompt(turns)
        pieces: list[str] = []
        with self.model.stream(prompt, self.params) as self._generation:
            if self.stopped:  # before there was anything to cancel
                self._generation.cancel()
            for chunk in self._generation:
                pieces.append(chunk.text)
                yield chunk
        self._generation = None
        if pieces:
            self.turns = [*turns, _turn("assistant", "".join(pieces))]

    def stop(self) -> None:
        """Call the answer off that is being given. Callable from a signal handler."""
        self.stopped = True
        if self._generation is not None:
            self._generation.cancel()

    def _prompt(self, turns: list[Turn]) -> list[int]:
        system = [_turn("system", self.system)] if self.system else []
        return self.model.chat_prompt([*system, *turns])


def _turn(role: str, text: str) -> Turn:
    return {"role": role, "content": text}


def answer_once(conversation: Conversation, prompt: str, *, as_json: bool) -> None:
    """Answer ``prompt`` on standard output and be done. ``as_json`` prints one object instead of the text."""
    text = _read_all(sys.stdin) if prompt == "-" else prompt
    if not text.strip():
        raise UserError("the prompt is empty; give it as -p TEXT, or on standard input with -p -")
    with on_interrupt(conversation.stop):
        chunks = []
        for chunk in conversation.ask(_sendable(text)):
            chunks.append(chunk)
            if not as_json:
                _write(chunk.text)
    if conversation.stopped:
        _write("\n")
        raise KeyboardInterrupt
    if as_json:
        last = chunks[-1]
        answer = {
            "text": "".join(chunk.text for chunk in chunks),
            "finish_reason": last.finish_reason,
            "num_prompt_tokens": last.num_prompt_tokens,
            "num_completion_tokens": last.num_completion_tokens,
        }
        _write(json.dumps(answer, ensure_ascii=False))
    _write("\n")


def chat_loop(conversation: Conversation) -> None:
    """Read messages and commands until the input ends or ``/exit``. Without a terminal, each line is one message."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and history, where Python has them
            import readline  # noqa: F401
        print(f"{conversation.model.name} · context of {conversation.model.context_length} tokens · /help")
    for message in _messages("› " if interactive else ""):
        command, _, rest = message.partition(" ")
        if command in ("/exit", "/quit"):
            return
        try:
            if not _command(conversation, command, rest.strip()):
                _answer(conversation, message)
        except UserError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)


def _command(conversation: Conversation, command: str, rest: str) -> bool:
    """Carry out a slash command; False where the line is a message."""
    match command:
        case "/help":
            print(HELP)
        case "/reset":
            conversation.reset(conversation.system)
            print("(a new conversation)")
        case "/system":
            conversation.reset(rest or None)
            print(
                "(a new conversation, with this system prompt)"
                if rest
                else "(a new conversation, no system prompt)"
            )
        case _ if command.startswith("/") and command[1:].isalpha():
            print(f"{command} is not a command; /help lists them")
        case _:
            return False
    return True


def _answer(conversation: Conversation, message: str) -> None:
    before = len(conversation.turns)
    with on_interrupt(conversation.stop):
        for chunk in conversation.ask(message):
            _write(chunk.text)
    _write(" (stopped)\n" if conversation.stopped else "\n")
    if len(conversation.turns) <= before and not conversation.stopped:
        print("(the beginning of the conversation no longer fits and is forgotten)", file=sys.stderr)


def _messages(prompt: str) -> Iterator[str]:
    """Lines of standard input that have something in them; ``\\`` at the end of a line joins it to the next."""
    joined, interrupted = "", False
    while True:
        try:
            line = input("  " if joined and prompt else prompt)
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            if interrupted or not prompt:
                raise
            print("\n(Ctrl-C again, Ctrl-D or /exit leaves)")
            joined, interrupted = "", True
            continue
        interrupted = False
        if line.endswith("\\"):
            joined += line[:-1] + "\n"
            continue
        message, joined = _sendable(joined + line).strip(), ""
        if message:
            yield message


def prepare_streams() -> None:
    """A character that the terminal's encoding lacks, or a broken one in the input, becomes ``?`` and not a failure."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _write(text: str) -> None:
    # A model may write escape sequences, and a terminal would obey them.
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _read_all(stream: TextIO) -> str:
    return stream.read()


def _sendable(text: str) -> str:
    """Without the lone surrogates that stand for undecodable bytes of a command line."""
    return text.encode("utf-8", "replace").decode("utf-8")
