"""A stand-in for a loaded model: deterministic, slow on demand, and it counts what the server makes it do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn
from minicpm_serve.app import create_app
from minicpm_serve.connection import Connection
from minicpm_serve.settings import ServerSettings

from minicpm_edge.engines.base import Cancelled
from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.engines.sequential import SequentialEngine
from minicpm_edge.language_model import LanguageModel

MARKDOWN = """Here is **bold**, *italic* and `code`:

```python
def greet(name):
    return f"<b>Hello</b>, {name}!"
```

1. one
2. two

- <img src=x onerror="alert(1)">
- [a link](https://example.com) and [a trap](javascript:alert(1))
"""


class Bytes:
    """A vocabulary of the 256 bytes and a stop token, with a template of one line a message."""

    vocab_size, bos_id, adds_bos = 257, 256, False
    bos_token = eos_token = "</s>"
    special_tokens = {"</s>": 256}  # noqa: RUF012
    chat_template = (
        "{% for message in messages %}"
        "{% if message.content == 'break the template' %}{{ raise_exception('cannot take this') }}{% endif %}"
        "{{ message.role }}: {{ message.content }}\n"
        "{% endfor %}assistant: "
    )

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        return bytes([index]) if index < 256 else b""


@dataclass
class FakeRunner:
    """Tokens are bytes. It repeats what it is told, or what a script says; slow on demand."""

    backend: str = "fake"
    context_length: int = 2048
    seconds_a_token: float = 0.0
    seconds_to_read: float = 0.0
    num_tokens: int = 0
    """Tokens written, over all generations."""
    num_cancelled: int = 0
    num_running: int = 0
    most_running: int = 0
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    closed: bool = False
    vocabulary = Bytes()
    stop_token_ids = frozenset({256})

    def tokens(self, prompt: Sequence[int], params: SamplingParams, cancelled: Cancelled) -> Generator[int]:
        text = self.vocabulary.decode(prompt)
        self.prompts.append(text)
        self.params.append(params)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            if self._cancelled_within(self.seconds_to_read, cancelled):
                return
            for token in (*reply_to(text).encode(), 256):
                if self._cancelled_within(self.seconds_a_token, cancelled):
                    return
                self.num_tokens += 1
                yield token
        finally:
            self.num_running -= 1

    def embed(self, tokens: Sequence[int]) -> list[float]:
        return [float(len(tokens)), 0.5, -1.0]

    def close(self) -> None:
        self.closed = True

    def _cancelled_within(self, seconds: float, cancelled: Cancelled) -> bool:
        end = time.monotonic() + seconds
        while not cancelled():
            if time.monotonic() >= end:
                return False
            time.sleep(min(0.005, seconds))
        self.num_cancelled += 1
        return True


class FakeModel(LanguageModel):
    """The product's own model and engine over a :class:`FakeRunner`, whose fields it shows."""

    def __init__(self, **options: float) -> None:
        self.runner = FakeRunner(**options)
        super().__init__(SequentialEngine(self.runner), name="fake-1")

    def __getattr__(self, name: str) -> object:
        return getattr(self.runner, name)


def reply_to(prompt: str) -> str:
    """What the fake answers to a rendered conversation or a plain prompt."""
    last = prompt.rpartition("user: ")[2].removesuffix("\nassistant: ")
    if last.startswith("count to "):
        return " ".join(str(number) for number in range(1, int(last.split()[2]) + 1))
    if last == "crash":
        raise ZeroDivisionError("a bug in the engine")
    scripts = {
        "markdown": MARKDOWN,
        "line ends": "a\u2028b\u2029c\x85d\ne\r\nf",
        "unicode": "naïve 漢字 👩‍👩‍👧 العربية",
    }
    return scripts.get(last, f"You said: {last}")


@dataclass(frozen=True)
class Running:
    """A server under test."""

    url: str
    model: FakeModel
    server: uvicorn.Server
    app: object

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


@contextmanager
def run_server(model: FakeModel, **settings) -> Iterator[Running]:
    """uvicorn on a free loopback port, in a thread."""
    app = create_app(model, ServerSettings(**settings))
    config = uvicorn.Config(
        app, http=Connection, port=0, log_level="critical", timeout_graceful_shutdown=2, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", model, server, app)
    finally:
        app.state.request_queue.stop()
        server.should_exit = True
        thread.join(10)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for ``condition`` to hold; fails the test where it does not, even on a machine with much else to do."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"still not so after {seconds} s")
        time.sleep(0.005)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def running(model: FakeModel) -> Iterator[Running]:
    with run_server(model) as server:
        yield server


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """``start(model, **settings)`` runs a server until the test ends."""
    with ExitStack() as servers:
        yield lambda model, **settings: servers.enter_context(run_server(model, **settings))


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., None]:
    return wait_until


@pytest.fixture
def make_model() -> type[FakeModel]:
    return FakeModel
