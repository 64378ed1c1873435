"""The server: OpenAI's routes over one loaded model, and the chat page at ``/``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from minicpm_edge.language_model import LanguageModel
from minicpm_serve import page
from minicpm_serve.api import errors
from minicpm_serve.api.request_queue import RequestQueue
from minicpm_serve.api.routes import OWNER, Routes
from minicpm_serve.api.security import SecurityMiddleware
from minicpm_serve.settings import ServerSettings


def create_app(language_model: LanguageModel, settings: ServerSettings) -> FastAPI:
    """The ASGI app. It does not close ``language_model``: whoever loaded it does, after the app has shut down.

    ``app.state.request_queue.stop()`` ends whatever is being generated, for a quick shutdown.
    """
    queue = RequestQueue(language_model, max_waiting=settings.max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    # The interactive docs load scripts from elsewhere; this server's pages load nothing from elsewhere.
    app = FastAPI(title=OWNER, lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.request_queue = queue
    app.add_middleware(SecurityMiddleware, settings=settings)
    errors.install(app)
    page.install(app)
    Routes(language_model, queue, settings.model_name or language_model.name).install(app)
    return app
