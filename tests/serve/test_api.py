"""The HTTP API, request by request: shapes, limits, and errors that say what is wrong and where."""

from __future__ import annotations

import base64
import struct

import pytest
from fastapi.testclient import TestClient
from minicpm_serve.app import create_app
from minicpm_serve.settings import ServerSettings


@pytest.fixture
def client(model):
    with TestClient(create_app(model, ServerSettings()), base_url="http://127.0.0.1:8080") as client:
        yield client


def ask(client, text="hello", **body):
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], **body})


def error_of(response, status=400):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_chat_completion_has_openais_fields(client):
    answer = ask(client, model="fake-1").json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "fake-1"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "You said: hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, written = len("user: hello\nassistant: "), len("You said: hello") + 1  # and the stop token
    assert answer["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written
    }  # fmt: skip


def test_a_text_completion_has_openais_fields_and_its_default_of_16_tokens(client):
    answer = client.post("/v1/completions", json={"prompt": "abcdefghijklmnopqrst"}).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "You said: abcdef", "logprobs": None, "finish_reason": "length"}
    ]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105], [[104, 105]]])
def test_a_prompt_may_be_text_or_token_ids(client, prompt):
    answer = client.post("/v1/completions", json={"prompt": prompt})
    assert answer.json()["choices"][0]["text"] == "You said: hi"


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["a", "b"], [[1], [2]]])
def test_no_prompt_and_several_prompts_are_refused(client, prompt):
    assert error_of(client.post("/v1/completions", json={"prompt": prompt}))["param"] == "prompt"


def test_sampling_settings_reach_the_engine(client, model):
    ask(
        client,
        max_completion_tokens=7, temperature=0, top_p=0, top_k=3, min_p=0.1, seed=-5, stop=["x", ""],
    )  # fmt: skip
    params = model.params[0]
    assert (params.max_tokens, params.temperature, params.top_k, params.min_p) == (7, 0, 3, 0.1)
    assert (params.seed, params.stop) == (-5, ("x",))
    assert 0 < params.top_p < 1e-3, "0 keeps only the likeliest token"


def test_null_means_the_default(client, model):
    nothing = (
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "tools",
        "n",
        "logprobs",
    )
    assert ask(client, **dict.fromkeys(nothing)).status_code == 200
    assert model.params[0].max_tokens is None


def test_content_parts_developer_role_and_a_fed_back_answer(client, model):
    reply = ask(client).json()["choices"][0]["message"]
    messages = [
        {"role": "developer", "content": "be brief"},
        {**reply, "tool_calls": None, "annotations": [], "audio": None, "function_call": None},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "ann",
        },
    ]
    assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert model.prompts[1] == "system: be brief\nassistant: You said: hello\nuser: ab\nassistant: "


def test_stop_strings_end_the_text(client):
    choice = ask(client, "one two three", stop="two").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("You said: one ", "stop")


def test_parameters_that_ask_for_nothing_are_accepted(client):
    harmless = {
        "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "logit_bias": {}, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"},
        "store": True, "service_tier": "auto", "parallel_tool_calls": True,
    }  # fmt: skip
    assert ask(client, **harmless).status_code == 200


@pytest.mark.parametrize(
    "parameter",
    [
        {"n": 2}, {"logprobs": True}, {"top_logprobs": 3}, {"presence_penalty": 0.5}, {"frequency_penalty": -1},
        {"response_format": {"type": "json_object"}}, {"tools": [{"type": "function"}]}, {"tool_choice": "required"},
        {"logit_bias": {"5": 100}}, {"modalities": ["text", "audio"]}, {"reasoning_effort": "high"}, {"echo": True},
        {"best_of": 4}, {"suffix": "end"}, {"n": True},
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(client, parameter):
    error = error_of(ask(client, **parameter))
    assert error["param"] == next(iter(parameter))
    assert error["code"] == "unsupported_parameter"
    assert error["message"].startswith(error["param"])


def test_an_unknown_parameter_names_the_nearest_known_one(client):
    error = error_of(ask(client, temprature=1))
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")
    assert "did you mean temperature?" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 3}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": -0.1}, "top_p"),
        ({"temperature": True}, "temperature"), ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"seed": 2**63}, "seed"),
        ({"top_k": -1}, "top_k"), ({"stop": 5}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"stream": "yes"}, "stream"),
        ({"stop": "x" * 2000}, "stop"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages.0.role"),
        ({"messages": [{"content": "5"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_name(client, body, param):
    error = error_of(
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], **body})
    )
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b'{"messages": [' * 5000, b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": [], "temperature": NaN}',
    ],
)  # fmt: skip
def test_a_broken_body_is_a_clear_400(client, content):
    response = client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert error_of(response)["type"] == "invalid_request_error"


def test_missing_messages_are_named(client):
    error = error_of(client.post("/v1/chat/completions", json={}))
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(client, content_type):
    headers = {"content-type": content_type}
    error_of(client.post("/v1/chat/completions", content=b'{"messages": []}', headers=headers), 415)


def test_the_wrong_model_is_404(client):
    for response in (
        ask(client, model="gpt-4o"),
        client.get("/v1/models/gpt-4o"),
        client.get("/v1/models/a/b"),
    ):
        error = error_of(response, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'fake-1'" in error["message"]


def test_unknown_address_and_method(client):
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "unknown_url"
    response = client.get("/v1/chat/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_a_prompt_longer_than_the_context_is_told_with_both_numbers(client, model):
    error = error_of(ask(client, "x" * 3000))
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"] and "3018" in error["message"]
    assert not model.params, "the engine never saw it"


def test_max_tokens_beyond_the_context_end_where_the_context_ends(client, model):
    model.runner.context_length = 40
    choice = ask(client, "0123456789", max_tokens=1000).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("You said: 01", "length")


def test_the_engines_own_complaint_is_a_400(client):
    assert "chat template" in error_of(ask(client, "break the template"))["message"]


def test_a_bug_is_a_500_that_gives_nothing_away(model):
    app = create_app(model, ServerSettings())
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        error = error_of(ask(client, "crash"), 500)
        assert error["type"] == "server_error"
        assert "bug" not in error["message"]
        streamed = ask(client, "crash", stream=True)
        assert '"type":"server_error"' in streamed.text and "bug" not in streamed.text
        assert "[DONE]" not in streamed.text
        assert ask(client).status_code == 200, "the next request is served"


def test_models_and_health(client):
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["context_length"]) == ("fake-1", "model", 2048)
    assert client.get("/v1/models/fake-1").json() == card
    assert client.get("/health").json() == {"status": "ok"}


def test_the_model_may_be_served_under_another_name(model):
    app = create_app(model, ServerSettings(model_name="org/my model"))
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/v1/models/org/my%20model").json()["id"] == "org/my model"
        assert ask(client, model="org/my model").json()["model"] == "org/my model"
        error_of(ask(client, model="fake-1"), 404)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("embeddings", {"input": ["a"] * 2049}, "input: the value should have at most 2048 items, not 2049"),
        ("embeddings", {"input": []}, "input: the value should have at least 1 item, not 0"),
        ("embeddings", {"input": ["a", 5]}, "input.1: the value should be a valid string"),
        ("completions", {"prompt": [1, "a"]}, "prompt.0: the value should be a valid string"),
        ("completions", {"prompt": "a", "stop": ["a", 5]}, "stop.1: the value should be a valid string"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 257}]},
            "messages.0.content: the value should have at most 256 items, not 257",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages.0.content.0.text: the value should be a valid string",
        ),
    ],
)
def test_the_message_is_of_the_shape_that_was_meant(client, path, body, message):
    assert error_of(client.post(f"/v1/{path}", json=body))["message"] == message


def test_embeddings_as_numbers_and_as_base64(client):
    body = {"model": "fake-1", "input": ["ab", "abc"]}
    answer = client.post("/v1/embeddings", json=body).json()
    assert [item["embedding"] for item in answer["data"]] == [[2.0, 0.5, -1.0], [3.0, 0.5, -1.0]]
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    coded = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    assert struct.unpack("<3f", base64.b64decode(coded["data"][1]["embedding"])) == (3.0, 0.5, -1.0)
    assert error_of(client.post("/v1/embeddings", json={"input": ""}))["param"] == "input"
    assert (
        error_of(client.post("/v1/embeddings", json={"input": "x", "dimensions": 5}))["param"] == "dimensions"
    )
