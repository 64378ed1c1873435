"""Sampling settings, the text stream, and the language model's handling of tokens (on a scripted engine)."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Generator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_edge.engines.base import Cancelled, SamplingParams
from minicpm_edge.errors import UserError
from minicpm_edge.language_model import LanguageModel
from minicpm_edge.text.detokenizer import TextStream

# --- settings ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", bad) for bad in (0, -1, 1.5, "5", True, 10**400, float("nan"))],
        *[("temperature", bad) for bad in (-0.1, float("nan"), float("inf"), "hot", None, True, 10**400)],
        *[("top_p", bad) for bad in (0, -0.1, 1.01, float("nan"), "all", [])],
        *[("top_k", bad) for bad in (-1, 1.0, "40", False, 2**31)],
        *[("min_p", bad) for bad in (-0.1, 1.1, None)],
        *[("seed", bad) for bad in (1.0, "1", 2**64, -(2**63) - 1, True)],
        *[("stop", bad) for bad in ("", [""], [1], {"a": 1}, 5, ["x"] * 17, ["x" * 257], None)],
    ],
)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(UserError, match=rf"^{name} ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_settings_at_their_limits():
    params = SamplingParams(
        max_tokens=1, temperature=0, top_p=1, top_k=0, min_p=1, stop=["a", "b"], seed=-(2**63)
    )
    assert params.stop == ("a", "b")
    assert SamplingParams(stop="END").stop == ("END",)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(UserError, match="did you mean temperature"):
        SamplingParams.of(temprature=1)
    with pytest.raises(UserError, match="settings are max_tokens, "):
        SamplingParams.of(zzz=1)


# --- text ---


def streamed(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    out = [stream.push(piece) for piece in pieces]
    return [*out, stream.finish()], stream.stopped


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


PLACES = st.lists(st.integers(0, 80), max_size=20)


@given(st.text(max_size=30), PLACES)
def test_split_characters_never_leak(text, places):
    out, _ = streamed(cut(text.encode("utf-8", "replace"), places))
    shown = ""
    for piece in out:
        shown += piece
        assert text.encode("utf-8", "replace").decode().startswith(shown)
    assert shown == text.encode("utf-8", "replace").decode()


@given(st.binary(max_size=40), PLACES)
def test_any_bytes_decode_as_in_one_piece(data, places):
    out, _ = streamed(cut(data, places))
    assert "".join(out) == data.decode("utf-8", errors="replace")


def test_a_replacement_character_comes_once_it_is_certain():
    stream = TextStream()
    assert stream.push(b"\xf0\x9f") == ""  # may become an emoji
    assert stream.push(b"\x99") == ""
    assert stream.push(b"x") == "\ufffdx"  # it did not
    assert stream.push(b"\xff") == "\ufffd"  # never can
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_a_character_cut_by_the_budget_is_dropped():
    stream = TextStream()
    assert stream.push("a🙂".encode()[:-1]) == "a"
    assert stream.finish(cut=True) == ""


def naive_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Character by character, as the rule is told."""
    for end in range(len(text) + 1):
        complete = [item for item in stop if text[:end].endswith(item)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(
    st.text("abé🙂", max_size=25),
    st.lists(st.text("abé🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    PLACES,
)
def test_stop_strings_across_any_cuts(text, stop, places):
    expected, stopped = naive_stop(text, stop)
    stream = TextStream(stop)
    shown = ""
    for piece in cut(text.encode(), places):
        shown += stream.push(piece)
        assert expected.startswith(shown)  # nothing of a stop string is ever shown
        if stream.stopped:
            break
    shown += stream.finish()
    assert (shown, stream.stopped) == (expected, stopped)


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop_string(text, stop):
    stream = TextStream([stop])
    shown = "".join(stream.push(character.encode()) for character in text)
    if not stream.stopped:
        held = text[len(shown) :]
        assert stop.startswith(held) and len(held) < len(stop)


def test_nothing_comes_after_a_stop():
    stream = TextStream(["END"])
    assert [stream.push(piece) for piece in (b"a", b"bE", b"N", b"D c", b"more")] == ["a", "b", "", "", ""]
    assert stream.finish() == "" and stream.stopped


# --- the language model over a scripted engine ---


class Bytes:
    """A vocabulary of the 256 bytes and an end token, 256."""

    vocab_size, bos_id, adds_bos = 257, 256, False
    bos_token = eos_token = "</s>"
    special_tokens = {"</s>": 256}  # noqa: RUF012
    chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        return bytes([index]) if index < 256 else b""


class Script:
    """An engine that says what it is told, byte by byte, and then its end token."""

    kind, context_length, end_ids, vocabulary = "script", 64, frozenset({256}), Bytes()

    def __init__(self, says: bytes) -> None:
        self.says = says
        self.given = 0
        self.released = False

    def tokens(self, prompt: Sequence[int], params: SamplingParams, cancelled: Cancelled) -> Generator[int]:
        self.released = False
        try:
            for token in (*self.says, 256):
                if cancelled():
                    return
                self.given += 1
                yield token
        finally:
            self.released = True

    def embed(self, tokens: Sequence[int]) -> list[float]:
        return [1.0]

    def close(self) -> None:
        pass


def run(says: bytes, **sampling):
    engine = Script(says)
    chunks = list(LanguageModel(engine, name="script").stream("hi", SamplingParams.of(**sampling)))
    assert engine.released
    assert all(chunk.text for chunk in chunks[:-1])
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return "".join(chunk.text for chunk in chunks), chunks[-1], engine


def test_the_end_token_stops():
    text, last, _ = run(b"hello")
    assert (text, last.finish_reason, last.num_prompt_tokens) == ("hello", "stop", 2)
    assert last.num_completion_tokens == 6  # the end token was generated too


def test_the_budget_stops_and_asks_for_no_token_more():
    text, last, engine = run(b"hello", max_tokens=3)
    assert (text, last.finish_reason, last.num_completion_tokens) == ("hel", "length", 3)
    assert engine.given == 3


def test_the_context_is_a_budget_too():
    text, last, _ = run(b"x" * 100)
    assert (len(text), last.finish_reason) == (62, "length")


def test_a_stop_string_stops_and_is_not_in_the_text():
    text, last, engine = run(b"one\ntwo\n\nthree", stop=["\n\n", "xyz"])
    assert (text, last.finish_reason) == ("one\ntwo", "stop")
    assert engine.given == len("one\ntwo\n\n")


def test_what_was_held_back_comes_at_the_end():
    text, last, _ = run(b"abEN", stop="END")
    assert (text, last.finish_reason) == ("abEN", "stop")
    text, last, _ = run(b"abENx", stop="END", max_tokens=4)
    assert (text, last.finish_reason) == ("abEN", "length")


def test_a_budget_within_a_character():
    text, last, _ = run("a🙂".encode(), max_tokens=3)
    assert (text, last.finish_reason) == ("a", "length")
    text, last, _ = run("a🙂".encode()[:-1])
    assert text == "a\ufffd" and last.finish_reason == "stop"


def test_leaving_a_loop_releases_the_engine():
    engine = Script(b"hello")
    model = LanguageModel(engine, name="script")
    for _ in model.chat([{"role": "user", "content": "x"}], stream=True):
        break
    assert engine.released and model.generate("again") == "hello"


def test_bad_messages():
    model = LanguageModel(Script(b""), name="script")
    for messages in ([], "hello", [{"role": "user", "content": 5}], [{"role": "boss", "content": "x"}], [7]):
        with pytest.raises(UserError):
            model.chat(messages)


def test_importing_costs_nothing_and_load_is_always_the_function():
    code = (
        "import sys, minicpm_edge.load\n"
        "heavy = {'torch', 'numpy', 'llama_cpp', 'onnxruntime', 'jinja2', 'tokenizers'} & sys.modules.keys()\n"
        "import minicpm_edge.language_model\n"
        "from minicpm_edge import load\n"
        "print(sorted(heavy), callable(load), callable(minicpm_edge.load))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert re.sub(r"\s+", " ", done.stdout + done.stderr).strip() == "[] True True"
