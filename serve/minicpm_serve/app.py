"""The server: OpenAI's routes over one loaded model, and the chat page at ``/``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from minicpm_edge.engines.base import Cancelled, Chunk
from minicpm_edge.language_model import LanguageModel
from minicpm_serve import page
from minicpm_serve.api import errors
from minicpm_serve.api.errors import ApiError
from minicpm_serve.api.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Sampling, read_body
from minicpm_serve.api.responses import Answer, ChatAnswer, Json, TextAnswer, embedding_list
from minicpm_serve.api.security import Guard
from minicpm_serve.api.streaming import EventStream, ListenedResponse, WholeAnswer
from minicpm_serve.request_queue import Generations
from minicpm_serve.settings import ServerSettings

OWNER = "minicpm-edge"


def create_app(language_model: LanguageModel, settings: ServerSettings) -> FastAPI:
    """The ASGI app. It does not close ``language_model``: whoever loaded it does, after the app has shut down.

    ``app.state.generations.stop()`` ends whatever is being generated, for a quick shutdown.
    """
    generations = Generations(max_waiting=settings.max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        generations.close()

    # The interactive docs load scripts from elsewhere; this server's pages load nothing from elsewhere.
    app = FastAPI(title=OWNER, lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.generations = generations
    app.add_middleware(Guard, settings=settings)
    errors.install(app)
    page.install(app)
    _Routes(language_model, generations, settings.model_name or language_model.name).install(app)
    return app


class _Routes:
    def __init__(self, language_model: LanguageModel, generations: Generations, model_name: str) -> None:
        self._model = language_model
        self._generations = generations
        self._name = model_name
        self._started = int(time.time())

    def install(self, app: FastAPI) -> None:
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/chat/completions")(self.chat_completions)
        app.post("/v1/completions")(self.completions)
        app.post("/v1/embeddings")(self.embeddings)

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._check_name(name)
        return JSONResponse(self._card())

    async def chat_completions(self, request: Request) -> Response:
        body = await read_body(request, ChatRequest)
        messages = body.conversation()
        return self._generate(body, lambda: self._model.chat_prompt(messages), ChatAnswer(model=self._name))

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, CompletionRequest)
        prompt = body.single_prompt()

        def make_prompt() -> list[int]:
            return self._model.text_prompt(prompt) if isinstance(prompt, str) else prompt

        return self._generate(body, make_prompt, TextAnswer(model=self._name))

    async def embeddings(self, request: Request) -> Response:
        body = await read_body(request, EmbeddingRequest)
        self._check_name(body.model)
        texts = body.texts()

        def work(cancelled: Cancelled) -> Iterator[tuple[list[float], int]]:
            for text in texts:
                if not cancelled():
                    ids = self._model.text_prompt(text)
                    self._check_length(ids)
                    yield self._model.embed(text), len(ids)

        def whole(vectors: Sequence[tuple[list[float], int]]) -> Json:
            return embedding_list(vectors, model=self._name, as_base64=body.encoding_format == "base64")

        return WholeAnswer(self._generations.events(work), whole)

    def _generate(
        self, body: Sampling, make_prompt: Callable[[], list[int]], answer: Answer
    ) -> ListenedResponse:
        self._check_name(body.model)
        params = body.sampling()

        def work(cancelled: Cancelled) -> Iterator[Chunk]:
            ids = make_prompt()
            self._check_length(ids)
            yield Chunk(text="", finish_reason=None, num_prompt_tokens=len(ids), num_completion_tokens=0)
            yield from self._model.stream(ids, params, cancelled=cancelled)

        chunks = self._generations.events(work)
        if body.stream:
            return EventStream(chunks, answer, with_usage=body.usage_wanted)
        return WholeAnswer(chunks, answer.whole)

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist here; this server has {self._name!r}",
                param="model",
                code="model_not_found",
            )

    def _check_length(self, ids: Sequence[int]) -> None:
        longest = self._model.context_length
        if len(ids) >= longest:
            raise ApiError(
                400,
                f"this model's context holds {longest} tokens, answer included, and the prompt has {len(ids)}; "
                "shorten it",
                code="context_length_exceeded",
            )

    def _card(self) -> Json:
        return {
            "id": self._name,
            "object": "model",
            "created": self._started,
            "owned_by": OWNER,
            "context_length": self._model.context_length,
        }
