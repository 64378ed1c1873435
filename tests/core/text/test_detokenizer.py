"""The incremental detokenizer, against decoding in one piece and a stop rule told character by character."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from minicpm_edge.text.detokenizer import IncrementalDetokenizer


def streamed(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream = IncrementalDetokenizer(stop)
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
    stream = IncrementalDetokenizer()
    assert stream.push(b"\xf0\x9f") == ""  # may become an emoji
    assert stream.push(b"\x99") == ""
    assert stream.push(b"x") == "\ufffdx"  # it did not
    assert stream.push(b"\xff") == "\ufffd"  # never can
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_a_character_cut_by_the_budget_is_dropped():
    stream = IncrementalDetokenizer()
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
    stream = IncrementalDetokenizer(stop)
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
    stream = IncrementalDetokenizer([stop])
    shown = "".join(stream.push(character.encode()) for character in text)
    if not stream.stopped:
        held = text[len(shown) :]
        assert stop.startswith(held) and len(held) < len(stop)


def test_nothing_comes_after_a_stop():
    stream = IncrementalDetokenizer(["END"])
    assert [stream.push(piece) for piece in (b"a", b"bE", b"N", b"D c", b"more")] == ["a", "b", "", "", ""]
    assert stream.finish() == "" and stream.stopped
