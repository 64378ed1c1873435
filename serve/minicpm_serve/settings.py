"""What the server is told at its start, checked where it is made. Safe by default: loopback, no CORS."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from minicpm_edge.errors import UserError

KEY_VARIABLE = "MINICPM_API_KEY"
# Apps have schemes of their own: app://obsidian.md, tauri://localhost.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How to listen, whom to answer, and how much to take on.

    Raises:
        UserError: for a bind that others could reach without a key, and for any value that cannot work.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    """Any one of these opens ``/v1``; empty means that everyone who can connect may use it."""
    allowed_hosts: tuple[str, ...] = ()
    """Names beside loopback's by which clients may call this server (the Host header, without port)."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages elsewhere that may use the API from a browser, as ``https://app.example`` or ``app://name``.

    ``*`` is every page. ``null`` is what pages opened from a file send, and what any other can send from a frame.
    """
    model_name: str | None = None
    """The model's name in the API; None takes the model's own."""
    max_waiting: int = 16
    """Requests that may wait for their turn; one more is answered 503."""
    max_body_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port is {self.port}; give 0 to 65535 (0 takes any free port)")
        if self.max_waiting < 0:
            raise UserError(f"--max-waiting is {self.max_waiting}; give 0 or more")
        for origin in self.allowed_origins:
            if origin != "*" and not is_origin(origin):
                raise UserError(
                    f"--allow-origin {origin!r} is not an origin; give one as https://app.example, without a path"
                )
        if self.api_keys:
            return
        if not is_loopback(self.host):
            raise UserError(
                f"{self.host} can be reached from other machines, so it needs a key: "
                f"--api-key-file FILE (one key a line), or {KEY_VARIABLE}; --host 127.0.0.1 needs none"
            )
        for origin in ("*", "null"):
            if origin in self.allowed_origins:
                raise UserError(
                    f"--allow-origin {origin!r} lets every web page use this server, so it needs a key: "
                    "--api-key-file FILE"
                )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. Names other than localhost count as reachable."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_origin(text: str) -> bool:
    """Whether a browser could send ``text`` in the Origin header: scheme and host, or ``null``."""
    return text == "null" or bool(_ORIGIN.fullmatch(text))


def read_keys(key_file: Path | None) -> tuple[str, ...]:
    """Keys of ``--api-key-file`` (one a line, ``#`` begins a comment line) and of the environment variable."""
    lines = _read(key_file).splitlines() if key_file else []
    lines.append(os.environ.get(KEY_VARIABLE, ""))
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                "an API key has spaces or other than plain ASCII characters, which no client can send"
            )
    if key_file and not keys:
        raise UserError(f"{key_file} has no API key in it; write one a line, 16 random characters or more")
    return tuple(dict.fromkeys(keys))


def _read(key_file: Path) -> str:
    try:
        return key_file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{key_file} cannot be read ({error.strerror}); --api-key-file names a file of keys"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{key_file} is not a text file; write one API key a line") from None
