"""Listening and shutting down: a socket checked before the model loads, and uvicorn that lets go at once on Ctrl-C."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minicpm_edge.errors import UserError
from minicpm_serve.connection import Connection
from minicpm_serve.settings import ServerSettings

SECONDS_TO_FINISH = 2
# uvicorn's ticks, ten a second.
TICKS_TO_CHECK = 10


def listen(settings: ServerSettings) -> socket.socket:
    """The listening socket. Opened before the model, so that a port in use is told at once and not after loading.

    Raises:
        UserError: when the port is taken, needs rights, or the host is not an address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror:
        raise UserError(f"--host {settings.host!r} is not a host name or address") from None
    except OSError as error:
        raise UserError(_why_not(error, settings)) from None


def _why_not(error: OSError, settings: ServerSettings) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {settings.port} is in use; stop what uses it, or give another: --port {settings.port + 1}"
        case errno.EACCES | errno.EPERM:
            return f"port {settings.port} needs administrator rights; give one above 1023: --port 8080"
        case errno.EADDRNOTAVAIL:
            return f"--host {settings.host} is not an address of this machine; --host 127.0.0.1 always is"
        case _:
            return f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}"


def url(settings: ServerSettings, listener: socket.socket) -> str:
    """Where the page is, with the real port where any free one was asked for."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def run(
    app: FastAPI, listener: socket.socket, *, announce: str, problem: Callable[[], str | None] = lambda: None
) -> None:
    """Serve until SIGINT or SIGTERM; prints ``announce`` once requests are answered.

    Raises:
        KeyboardInterrupt: after the orderly end that Ctrl-C asks for.
        UserError: when ``problem``, asked once a second, tells why the server cannot go on.
    """
    config = uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
        ws="none",
    )
    server = _Server(config, app, announce, problem)
    server.run(sockets=[listener])
    if server.problem is not None:
        raise UserError(server.problem)
    # Whether uvicorn itself passes the interrupt on depends on its version.
    if server.interrupted:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, app: FastAPI, announce: str, find_problem: Callable[[], str | None]
    ) -> None:
        super().__init__(config)
        self._app, self._announce, self._find_problem = app, announce, find_problem
        self.interrupted = False
        self.problem: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._announce, flush=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_TO_CHECK == 0:
            self.problem = self._find_problem()
        if self.problem is not None:
            self._app.state.request_queue.stop()
            return True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn waits for answers to end; a long one would keep Ctrl-C waiting, so they are ended too.
        self.interrupted = sig == signal.SIGINT
        self._app.state.request_queue.stop()
        super().handle_exit(sig, frame)
