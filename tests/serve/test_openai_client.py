"""The official ``openai`` client, unchanged, against a real server on loopback."""

from __future__ import annotations

import asyncio

import openai
import pytest


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


QUESTION = [{"role": "user", "content": "hello"}]


def test_chat(client):
    answer = client.chat.completions.create(
        model="fake-1", messages=QUESTION, max_tokens=50, temperature=0, seed=1
    )
    assert answer.choices[0].message.content == "You said: hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_an_answer_can_be_sent_back(client, running):
    message = client.chat.completions.create(model="fake-1", messages=QUESTION).choices[0].message
    client.chat.completions.create(
        model="fake-1", messages=[*QUESTION, message, {"role": "user", "content": "more"}]
    )
    assert "assistant: You said: hello\nuser: more" in running.model.prompts[1]


def test_chat_stream_with_usage(client):
    stream = client.chat.completions.create(
        model="fake-1", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == "You said: hello"
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == len("You said: hello") + 1


def test_the_stream_helper(client):
    with client.chat.completions.stream(model="fake-1", messages=QUESTION) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "You said: hello"


def test_leaving_a_stream_stops_the_generation(start, make_model, wait_until):
    server = start(make_model(seconds_a_token=0.01))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        messages = [{"role": "user", "content": "count to 400"}]
        with client.chat.completions.create(model="fake-1", messages=messages, stream=True) as stream:
            for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
    wait_until(lambda: server.model.num_cancelled == 1)


def test_text_completions(client):
    assert client.completions.create(model="fake-1", prompt="hi").choices[0].text == "You said: hi"
    stream = client.completions.create(model="fake-1", prompt="hi", stream=True, max_tokens=5)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "You s"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_our_own_settings_go_in_extra_body(client, running):
    client.chat.completions.create(model="fake-1", messages=QUESTION, extra_body={"top_k": 5, "min_p": 0.2})
    assert (running.model.params[0].top_k, running.model.params[0].min_p) == (5, 0.2)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake-1"]
    assert client.models.retrieve("fake-1").owned_by == "minicpm-edge"


def test_embeddings(client):
    answer = client.embeddings.create(model="fake-1", input="abc")  # the client asks for base64 by itself
    assert answer.data[0].embedding == [3.0, 0.5, -1.0]


def test_async_client(running):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            answers = [client.chat.completions.create(model="fake-1", messages=QUESTION) for _ in range(3)]
            stream = await client.chat.completions.create(model="fake-1", messages=QUESTION, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)] + [
                streamed
            ]

    assert asyncio.run(ask()) == ["You said: hello"] * 4


def test_errors_arrive_as_the_clients_own_exceptions(client, start, make_model):
    def create(**more):
        return client.chat.completions.create(**{"model": "fake-1", "messages": QUESTION, **more})

    with pytest.raises(openai.NotFoundError, match="does not exist here") as missing:
        create(model="gpt-4o")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n: not supported") as unsupported:
        create(n=2)
    assert unsupported.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="context holds"):
        create(messages=[{"role": "user", "content": "x" * 3000}], stream=True)

    server = start(make_model(), api_keys=("right-key",))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert stranger.with_options(api_key="right-key").models.list().data[0].id == "fake-1"


def test_a_failure_midway_raises_in_the_client(client):
    with pytest.raises(openai.APIError, match="the server failed"):
        list(
            client.chat.completions.create(
                model="fake-1", messages=[{"role": "user", "content": "crash"}], stream=True
            )
        )
