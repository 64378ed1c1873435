"""The language model's handling of tokens, over a scripted model: where a text ends, and how it is called off."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest

from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.errors import UserError


@pytest.fixture
def run(scripted):
    return functools.partial(_run, scripted)


def _run(scripted, says: bytes, **sampling):
    model = scripted(says)
    chunks = list(model.stream("hi", SamplingParams.of(**sampling)))
    assert model.runner.released
    assert all(chunk.text for chunk in chunks[:-1])
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return "".join(chunk.text for chunk in chunks), chunks[-1], model.runner


def test_the_end_token_stops(run):
    text, last, _ = run(b"hello")
    assert (text, last.finish_reason, last.num_prompt_tokens) == ("hello", "stop", 2)
    assert last.num_completion_tokens == 6  # the end token was generated too


def test_the_budget_stops_and_asks_for_no_token_more(run):
    text, last, engine = run(b"hello", max_tokens=3)
    assert (text, last.finish_reason, last.num_completion_tokens) == ("hel", "length", 3)
    assert engine.given == 3


def test_the_context_is_a_budget_too(run):
    text, last, _ = run(b"x" * 100)
    assert (len(text), last.finish_reason) == (62, "length")


def test_a_stop_string_stops_and_is_not_in_the_text(run):
    text, last, engine = run(b"one\ntwo\n\nthree", stop=["\n\n", "xyz"])
    assert (text, last.finish_reason) == ("one\ntwo", "stop")
    assert engine.given == len("one\ntwo\n\n")


def test_what_was_held_back_comes_at_the_end(run):
    text, last, _ = run(b"abEN", stop="END")
    assert (text, last.finish_reason) == ("abEN", "stop")
    text, last, _ = run(b"abENx", stop="END", max_tokens=4)
    assert (text, last.finish_reason) == ("abEN", "length")


def test_a_budget_within_a_character(run):
    text, last, _ = run("a🙂".encode(), max_tokens=3)
    assert (text, last.finish_reason) == ("a", "length")
    text, last, _ = run("a🙂".encode()[:-1])
    assert text == "a\ufffd" and last.finish_reason == "stop"


def test_leaving_a_loop_releases_the_engine(scripted):
    model = scripted(b"hello")
    for _ in model.chat([{"role": "user", "content": "x"}], stream=True):
        break
    assert model.generate("again") == "hello" and model.runner.released


def test_bad_messages(scripted):
    model = scripted(b"")
    for messages in ([], "hello", [{"role": "user", "content": 5}], [{"role": "boss", "content": "x"}], [7]):
        with pytest.raises(UserError):
            model.chat(messages)


def test_importing_costs_nothing_and_load_is_always_the_function():
    code = (
        "import sys, minicpm_edge.load\n"
        "heavy = {'torch', 'numpy', 'llama_cpp', 'onnxruntime', 'jinja2', 'tokenizers'} & sys.modules.keys()\n"
        "assert 'minicpm_edge.language_model' not in sys.modules\n"
        "import minicpm_edge.language_model\n"
        "from minicpm_edge import LanguageModel, SamplingParams, UserError, load\n"
        "print(sorted(heavy), callable(load), load is minicpm_edge.load)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert re.sub(r"\s+", " ", done.stdout + done.stderr).strip() == "[] True True"
