"""Responses that last as long as their client listens: one JSON object, or server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Generic, TypeVar

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from minicpm_edge.engines.base import Chunk
from minicpm_edge.errors import UserError
from minicpm_serve.api.errors import ApiError, as_api_error
from minicpm_serve.api.responses import CompletionSchema, Json

Event = TypeVar("Event")

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect the whole stream before it passes anything on
]
# JSON leaves these as they are, but many clients' line splitters take them for line ends, which end an event.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def event(data: Json) -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"data: {text}\n\n".encode()


class ListenedResponse(Response):
    """Works while its client listens. A client that goes away ends the work, at whatever stage it is."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future(self._respond(scope, receive, send))
        leaving = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()
            await asyncio.wait({answering})
        if not answering.cancelled():
            answering.result()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class WholeResponse(ListenedResponse, Generic[Event]):
    """One JSON object made of all events, once the last is there."""

    def __init__(self, events: AsyncGenerator[Event], whole: Callable[[list[Event]], Json]) -> None:
        super().__init__()
        self._events, self._whole = events, whole

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            collected = [event async for event in events]
        await JSONResponse(self._whole(collected))(scope, receive, send)


class EventStream(ListenedResponse):
    """Server-sent events: one for each piece of text, then why it ended, then ``[DONE]``.

    A failure before the first is an HTTP error like any other; after it, an error event ends the stream.
    """

    def __init__(self, chunks: AsyncGenerator[Chunk], schema: CompletionSchema, *, with_usage: bool) -> None:
        super().__init__()
        self._chunks, self._schema, self._with_usage = chunks, schema, with_usage

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
            try:
                async for data in self._events(first, chunks):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                data = event(as_api_error(error).body())
                await send({"type": "http.response.body", "body": data, "more_body": True})
                if not isinstance(error, ApiError | UserError):
                    raise  # a bug of ours: on to the log, and the broken-off stream tells the client
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, first: Chunk, rest: AsyncGenerator[Chunk]) -> AsyncGenerator[bytes]:
        """``first`` comes before the prompt is read, so that the client knows at once that it has been heard."""
        opening = self._schema.opening()
        if opening is not None:
            yield self._event(opening)
        last = first
        async for last in rest:
            if last.text:
                yield self._event(self._schema.piece(last.text))
        yield self._event(self._schema.ending(last.finish_reason))
        if self._with_usage:
            yield event(self._schema.usage(last))
        yield DONE

    def _event(self, data: Json) -> bytes:
        # Where usage is asked for, OpenAI gives every chunk the field, null until the last.
        return event({**data, "usage": None} if self._with_usage else data)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
