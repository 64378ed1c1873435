"""Streams over real sockets: order, whole characters, clients that leave, and a server that stays awake meanwhile."""

from __future__ import annotations

import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest


def body(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def events_of(lines):
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def stream(client, text, **more):
    with client.stream("POST", "/v1/chat/completions", json=body(text, stream=True, **more)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.iter_lines())


def text_of(events):
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


def test_role_text_reason_and_usage_come_in_order(running):
    with running.client() as client:
        events = stream(client, "hi", stream_options={"include_usage": True})
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert text_of(events) == "You said: hi"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len("You said: hi") + 1
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1


def test_without_include_usage_there_is_no_usage(running):
    with running.client() as client:
        assert all("usage" not in event for event in stream(client, "hi"))


@pytest.mark.parametrize("text", ["unicode", "line ends", "𝔘𝔫𝔦 – ß\t\0\x1b[31m"])
def test_every_character_arrives_whole(running, text):
    """The fake's tokens are bytes, so every character beyond ASCII is split; str.splitlines must not split an event."""
    with running.client() as client:
        whole = client.post("/v1/chat/completions", json=body(text)).json()["choices"][0]["message"][
            "content"
        ]
        events = stream(client, text)
    assert text_of(events) == whole
    assert "\ufffd" not in whole
    assert text in whole or text in ("unicode", "line ends")


def test_a_cut_character_is_not_shown(running):
    with running.client() as client:
        events = stream(client, "unicode", max_tokens=3)  # n, a, and the first byte of ï
    assert text_of(events) == "na"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("streamed", [True, False])
def test_leaving_while_it_writes_stops_the_generation(start, make_model, wait_until, streamed):
    server = start(make_model(seconds_a_token=0.05))
    with server.client() as client:
        leave_after(
            client, body("count to 400", stream=streamed), lambda: server.model.num_tokens > 5, wait_until
        )
    wait_until(lambda: server.model.num_running == 0)
    assert server.model.num_cancelled == 1
    assert server.model.num_tokens < 400, "of 1491"


@pytest.mark.parametrize("streamed", [True, False])
def test_leaving_while_it_reads_the_prompt_stops_the_generation(start, make_model, wait_until, streamed):
    server = start(make_model(seconds_to_read=300))
    with server.client() as client:
        leave_after(client, body("hi", stream=streamed), lambda: server.model.num_running == 1, wait_until)
    wait_until(lambda: server.model.num_running == 0)
    assert server.model.num_tokens == 0


def test_leaving_while_waiting_gives_up_the_place(start, make_model, wait_until):
    server = start(make_model(seconds_a_token=0.01), max_waiting=1)
    queue = server.app.state.request_queue
    with server.client() as first, server.client() as second, server.client() as third:
        with first.stream("POST", "/v1/chat/completions", json=body("count to 400", stream=True)):
            leave_after(second, body("hi", stream=True), lambda: queue.num_waiting == 1, wait_until)
            wait_until(lambda: queue.num_waiting == 0)
        answer = third.post("/v1/chat/completions", json=body("me"))
    assert answer.json()["choices"][0]["message"]["content"] == "You said: me"
    assert len(server.model.prompts) == 2, "the one that left was never begun"


def leave_after(client, request, condition, wait_until):
    """Send ``request``, wait for ``condition``, and close the connection."""
    host, port = client.base_url.host, client.base_url.port
    content = json.dumps(request).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(condition)


def test_the_server_answers_others_while_it_generates(start, make_model):
    server = start(make_model(seconds_a_token=0.05))
    with (
        server.client() as client,
        server.client() as other,
        client.stream("POST", "/v1/chat/completions", json=body("count to 400", stream=True)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        for path in ("/health", "/v1/models", "/"):
            assert other.get(path).status_code == 200
        assert server.model.num_running == 1, "it was generating all the while"
        assert server.model.num_tokens < 400, "of 1491: nor did they wait for a part of it"


def test_the_first_event_comes_before_the_prompt_is_read(start, make_model):
    server = start(make_model(seconds_to_read=300))
    with (
        server.client() as client,
        client.stream("POST", "/v1/chat/completions", json=body("hi", stream=True)) as response,
    ):
        assert '"role":"assistant"' in next(response.iter_lines())
        assert server.model.num_tokens == 0


def test_many_at_once_take_turns_and_keep_their_own_answers(start, make_model):
    server = start(make_model(seconds_a_token=0.0005), max_waiting=32)

    def ask(number):
        with server.client() as client:
            if number % 2:
                return text_of(stream(client, f"number {number}"))
            answer = client.post("/v1/chat/completions", json=body(f"number {number}"))
            return answer.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(24)))
    assert answers == [f"You said: number {number}" for number in range(24)]
    assert server.model.most_running == 1


def test_a_full_queue_is_503_with_a_time_to_retry(start, make_model, wait_until):
    server = start(make_model(seconds_a_token=0.1), max_waiting=1)
    queue = server.app.state.request_queue

    def ask():
        with server.client() as client:
            client.post("/v1/chat/completions", json=body("count to 60", stream=True))

    with ThreadPoolExecutor(2) as pool:
        for number in (1, 2):
            pool.submit(ask)
            wait_until(lambda: server.model.num_running + queue.num_waiting == number)  # noqa: B023
        with server.client() as client:
            refused = client.post("/v1/chat/completions", json=body("hi"))
        queue.stop()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_shutting_down_ends_a_stream_with_an_error_event(start, make_model):
    server = start(make_model(seconds_a_token=0.01))
    with (
        server.client() as client,
        client.stream("POST", "/v1/chat/completions", json=body("count to 400", stream=True)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.app.state.request_queue.stop()
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_an_error_before_the_first_event_is_an_http_error(running):
    with running.client() as client:
        response = client.post("/v1/chat/completions", json=body("x" * 3000, stream=True))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_client_that_leaves_within_its_body_leaves_nothing_in_the_log(running, wait_until, caplog):
    logger = logging.getLogger("uvicorn.error")
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    host, port = running.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    try:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"prompt":'.encode())
            wait_until(lambda: running.server.server_state.tasks)
        wait_until(lambda: not running.server.server_state.tasks)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b'Content-Length: 1000\r\n\r\n{"prompt":'])
def test_a_connection_without_a_whole_request_is_closed(running, monkeypatch, sent):
    monkeypatch.setattr("minicpm_serve.connection.REQUEST_SECONDS", 0.2)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(sent)
        assert connection.recv(1) == b""


def test_an_answer_may_take_longer_than_a_request(start, make_model, monkeypatch):
    monkeypatch.setattr("minicpm_serve.connection.REQUEST_SECONDS", 0.2)
    with start(make_model(seconds_to_read=0.8)).client() as client:
        assert text_of(stream(client, "hi")) == "You said: hi"
        assert text_of(stream(client, "again")) == "You said: again"
