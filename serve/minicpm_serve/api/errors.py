"""Errors as OpenAI's API shapes them: ``{"error": {"message", "type", "param", "code"}}``.

The official client maps the HTTP status to its exception class and shows ``message``, so both matter.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minicpm_edge.errors import UserError

INVALID, AUTHENTICATION, PERMISSION, OVERLOADED, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "overloaded_error",
    "server_error",
)


class ApiError(Exception):
    """An answer other than success: HTTP status, and the four fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """The JSON body, also sent as an event where a stream breaks off."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any failure; of our own bugs only that there was one."""
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError(400, str(error))
        case HTTPException():
            return _from_router(error)
        case _:
            return ApiError(500, "the server failed on this request; its log says why", kind=SERVER)


def _from_router(error: HTTPException) -> ApiError:
    messages = {404: "there is nothing at this address", 405: "this address does not take this HTTP method"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, code=_CODES.get(error.status_code), headers=error.headers)


_CODES = {404: "unknown_url", 405: "method_not_allowed"}


def install(app: FastAPI) -> None:
    """Answer every failure inside ``app`` in OpenAI's shape."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def hang_up(_: Request, error: Exception) -> Response:
        # The client left before its request was complete: nobody hears an answer, and nothing is wrong here.
        return Response(status_code=400)

    app.add_exception_handler(ClientDisconnect, hang_up)
    for kind in (ApiError, UserError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
