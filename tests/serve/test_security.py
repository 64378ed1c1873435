"""Who gets an answer: hosts, origins, keys and sizes, and a start that is refused where it would be unsafe."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from fastapi.testclient import TestClient
from minicpm_serve import server
from minicpm_serve.app import create_app
from minicpm_serve.settings import ServerSettings, read_keys

from minicpm_edge.cli.main import main
from minicpm_edge.errors import UserError

QUESTION = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture
def connect(model):
    """A client of a server with these settings, as if it listened on port 8080."""
    return lambda **settings: TestClient(
        create_app(model, ServerSettings(**settings)), base_url="http://127.0.0.1:8080"
    )


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080", "127.0.0.1"])
def test_loopback_names_are_answered(connect, host):
    assert connect().get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "192.168.1.5",
        "",
        "127.0.0.1:8080@evil.example",
        "localhost:8080@evil.example",
        "localhost@evil.example",
        "localhost:8080/",
        "localhost:port",
        "[::1]evil.example",
        "[::1%evil]",
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/static/app.js"])
def test_a_rebound_name_gets_nothing(connect, host, path):
    answer = connect().get(path, headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


def test_hosts_beyond_loopback(connect):
    client = connect(host="0.0.0.0", api_keys=("key",), allowed_hosts=("My-Box.example:8080",))
    assert client.get("/health", headers={"host": "192.168.1.5:8080"}).status_code == 200, (
        "an address is no name"
    )
    assert client.get("/health", headers={"host": "my-box.example"}).status_code == 200
    assert client.get("/health", headers={"host": socket.gethostname()}).status_code == 200
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:9999", "null", "http://localhost:8080"]
)
def test_pages_of_others_may_not_even_ask(connect, model, origin):
    answer = connect().post(CHAT, json=QUESTION, headers={"origin": origin})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers
    assert not model.prompts


@pytest.mark.parametrize("origin", ["app://obsidian.md", "tauri://localhost", "https://app.example:8443"])
def test_a_refused_origin_is_told_the_flag_that_lets_it_in(connect, origin):
    refused = connect().post(CHAT, json=QUESTION, headers={"origin": origin}).json()["error"]["message"]
    assert f"--allow-origin {origin} " in refused
    answer = connect(allowed_origins=(origin,)).post(CHAT, json=QUESTION, headers={"origin": origin})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)


def test_the_origin_of_files_needs_a_key_since_every_page_can_send_it(connect):
    refused = connect().get("/v1/models", headers={"origin": "null"}).json()["error"]["message"]
    assert "--api-key-file FILE --allow-origin null" in refused
    with pytest.raises(UserError, match="--api-key-file"):
        ServerSettings(allowed_origins=("null",))
    client = connect(allowed_origins=("null",), api_keys=("key",))
    headers = {"origin": "null", "authorization": "Bearer key"}
    assert client.get("/v1/models", headers=headers).headers["access-control-allow-origin"] == "null"


def test_what_is_no_origin_gets_no_advice(connect):
    answer = connect().get("/v1/models", headers={"origin": "https://a.example/page"})
    assert answer.status_code == 403
    assert "--allow-origin" not in answer.json()["error"]["message"]


def test_the_own_page_may_ask(connect):
    answer = connect().post(CHAT, json=QUESTION, headers={"origin": "http://127.0.0.1:8080"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers, "same origin needs no CORS"


def test_an_allowed_origin_gets_cors_and_others_do_not(connect):
    client = connect(allowed_origins=("https://app.example",))
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-os",
    }
    preflight = client.options(CHAT, headers={"origin": "https://app.example", **asked})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    answer = client.post(CHAT, json=QUESTION, headers={"origin": "https://app.example"})
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers
    assert client.options(CHAT, headers={"origin": "https://evil.example", **asked}).status_code == 403


def test_an_allowed_origin_can_read_errors(connect):
    client = connect(allowed_origins=("https://app.example",), api_keys=("key",))
    answer = client.get("/v1/models", headers={"origin": "https://app.example"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer one,two", "Basic one", "one", "Bearer onetwo"],
)
@pytest.mark.parametrize("path", ["/v1/models", CHAT, "/v1/nothing", "/openapi.json", "/static", "/health/"])
def test_without_a_key_nothing_but_the_page_and_health(connect, given, path):
    headers = {} if given is None else {"authorization": given}
    answer = connect(api_keys=("one", "two")).get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"


def test_every_key_opens_and_the_page_needs_none(connect):
    client = connect(api_keys=("one", "two"))
    for key in ("one", "two"):
        assert client.post(CHAT, json=QUESTION, headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": b"Bearer \xff\xfe"}).status_code == 401
    for path in ("/", "/health", "/static/app.js", "/static/app.css"):
        assert client.get(path).status_code == 200


def test_a_body_too_large_is_refused_announced_or_not(connect, model):
    client = connect(max_body_bytes=1000)
    announced = client.post(CHAT, content=b"x" * 1001, headers={"content-type": "application/json"})
    chunked = client.post(CHAT, content=iter([b"x" * 600] * 5), headers={"content-type": "application/json"})
    huge = client.post(
        CHAT, content=b"{}", headers={"content-type": "application/json", "content-length": "9" * 5000}
    )
    for answer in (announced, chunked, huge):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    for length in ("-1", "ten", "1e3", "٣"):
        answer = client.post(CHAT, content=b"{}", headers={"content-length": length.encode()})
        assert answer.status_code == 400


def test_the_page_allows_itself_only(connect):
    headers = connect().get("/").headers
    policy = dict(item.split(" ", 1) for item in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/..%2fapp.py", "/static//etc/passwd", "/static/", "/docs"]
)
def test_only_the_pages_own_files_are_served(connect, path):
    assert connect().get(path).status_code == 404


def test_page_files_are_revalidated(connect):
    client = connect()
    first = client.get("/static/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/static/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-box.example", ""])
def test_a_bind_beyond_loopback_needs_a_key(host):
    with pytest.raises(UserError, match="--api-key-file"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=("key",)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert ServerSettings(host=host).api_keys == ()


def test_every_origin_needs_a_key():
    with pytest.raises(UserError, match="--api-key-file"):
        ServerSettings(allowed_origins=("*",))
    assert ServerSettings(allowed_origins=("*",), api_keys=("key",))


@pytest.mark.parametrize(
    "origin",
    ["app.example", "https://app.example/", "https://app.example/x", "https://", "https://a@b", "://a", ""],
)
def test_an_origin_is_scheme_and_host(origin):
    with pytest.raises(UserError, match="is not an origin"):
        ServerSettings(allowed_origins=(origin,))


def test_keys_are_read_from_file_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MINICPM_API_KEY", "from-environment")
    keys = tmp_path / "keys"
    keys.write_text("# laptops\nfirst\n\n  second  \nfirst\n")
    assert read_keys(keys) == ("first", "second", "from-environment")
    assert read_keys(None) == ("from-environment",)
    monkeypatch.delenv("MINICPM_API_KEY")
    assert read_keys(None) == ()


@pytest.mark.parametrize(
    "content", [b"", b"# nothing\n\n", b"two words\n", b"\xff\xfe\x00", "ключ\n".encode()]
)
def test_an_unusable_key_file_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.delenv("MINICPM_API_KEY", raising=False)
    keys = tmp_path / "keys"
    keys.write_bytes(content)
    with pytest.raises(UserError):
        read_keys(keys)


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent"):
        read_keys(tmp_path / "absent")


def test_a_port_in_use_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use.*--port {port + 1}"):
            server.listen(ServerSettings(port=port))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "needs a key"),
        (["--host", "203.0.113.7", "--api-key-file", "KEYS"], "not an address of this machine"),
        (["--host", "no such host", "--api-key-file", "KEYS"], "not a host name"),
        (["--port", "70000"], "0 to 65535"),
        (["--max-waiting", "-1"], "0 or more"),
        (["--allow-origin", "*"], "needs a key"),
        (["--port", "0", "absent.gguf"], "absent.gguf"),
    ],
)
def test_a_start_that_cannot_work_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MINICPM_API_KEY", raising=False)
    (tmp_path / "KEYS").write_text("a-long-enough-key\n")
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ") and words in lines[0]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from minicpm_edge.cli.main import main; main(['serve', '--help']); main(['chat', '--help']);"
        "heavy = {'torch', 'llama_cpp', 'fastapi', 'uvicorn', 'pydantic', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
