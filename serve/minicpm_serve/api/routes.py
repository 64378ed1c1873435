"""OpenAI's routes over one loaded model: what each reads, asks the queue for, and sends."""

from __future__ import annotations

import time
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from minicpm_edge.language_model import LanguageModel
from minicpm_serve.api.errors import ApiError
from minicpm_serve.api.request_queue import MakePrompt, RequestQueue
from minicpm_serve.api.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Sampling, read_body
from minicpm_serve.api.responses import (
    ChatCompletion,
    CompletionSchema,
    Json,
    TextCompletion,
    embedding_list,
)
from minicpm_serve.api.streaming import EventStream, ListenedResponse, WholeResponse

OWNER = "minicpm-edge"


class Routes:
    """The handlers, bound to a model, its queue and its name in the API."""

    def __init__(self, language_model: LanguageModel, queue: RequestQueue, model_name: str) -> None:
        self._model = language_model
        self._queue = queue
        self._name = model_name
        self._started = int(time.time())

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/chat/completions")(self.chat_completions)
        app.post("/v1/completions")(self.completions)
        app.post("/v1/embeddings")(self.embeddings)

    async def health(self) -> Response:
        """``GET /health``: whether the server is up."""
        return JSONResponse({"status": "ok"})

    async def models(self) -> Response:
        """``GET /v1/models``."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """``GET /v1/models/{name}``."""
        self._check_name(name)
        return JSONResponse(self._card())

    async def chat_completions(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        body = await read_body(request, ChatRequest)
        make_prompt = partial(self._model.chat_prompt, body.conversation())
        return self._generate(body, make_prompt, ChatCompletion(model=self._name))

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        body = await read_body(request, CompletionRequest)
        make_prompt = partial(self._text_prompt, body.single_prompt())
        return self._generate(body, make_prompt, TextCompletion(model=self._name))

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        body = await read_body(request, EmbeddingRequest)
        self._check_name(body.model)
        prompts = [self._checked(partial(self._text_prompt, text)) for text in body.texts()]
        as_base64 = body.encoding_format == "base64"
        return WholeResponse(
            self._queue.embed(prompts),
            lambda vectors: embedding_list(vectors, model=self._name, as_base64=as_base64),
        )

    def _generate(
        self, body: Sampling, make_prompt: MakePrompt, schema: CompletionSchema
    ) -> ListenedResponse:
        self._check_name(body.model)
        chunks = self._queue.generate(self._checked(make_prompt), body.sampling())
        if body.stream:
            return EventStream(chunks, schema, with_usage=body.usage_wanted)
        return WholeResponse(chunks, schema.whole)

    def _text_prompt(self, prompt: str | list[int]) -> list[int]:
        return self._model.text_prompt(prompt) if isinstance(prompt, str) else prompt

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist here; this server has {self._name!r}",
                param="model",
                code="model_not_found",
            )

    def _checked(self, make_prompt: MakePrompt) -> MakePrompt:
        """``make_prompt`` with an error of OpenAI's code where its prompt does not fit the context."""

        def checked() -> list[int]:
            ids, longest = make_prompt(), self._model.context_length
            if len(ids) >= longest:
                raise ApiError(
                    400,
                    f"this model's context holds {longest} tokens, answer included, and the prompt has {len(ids)}; "
                    "shorten it",
                    code="context_length_exceeded",
                )
            return ids

        return checked

    def _card(self) -> Json:
        return {
            "id": self._name,
            "object": "model",
            "created": self._started,
            "owned_by": OWNER,
            "context_length": self._model.context_length,
        }
