"""A model inside your own FastAPI app: ``MODEL=model.gguf uvicorn --app-dir examples fastapi_app:app``.

``curl -N localhost:8000/explain -H "Content-Type: application/json" -d '{"text": "print(1 + 1)"}'`` streams an answer.
A client that leaves stops it.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from minicpm_edge import SamplingParams, UserError, load


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model once, and free it at the end."""
    with load(os.environ.get("MODEL")) as app.state.lm:
        yield


app = FastAPI(lifespan=lifespan)


class Question(BaseModel):
    """What to explain."""

    text: str


@app.post("/explain")
async def explain(question: Question, request: Request) -> StreamingResponse:
    """Explain the text, as plain text while it is written."""
    lm = request.app.state.lm
    messages = [{"role": "user", "content": f"Explain in one sentence:\n{question.text}"}]
    try:
        answer = lm.astream(lm.chat_prompt(messages), SamplingParams(max_tokens=100, temperature=0))
    except UserError as error:  # the text does not fit the context, for one
        raise HTTPException(400, str(error)) from None

    async def pieces() -> AsyncIterator[str]:
        async with answer:
            async for chunk in answer:
                yield chunk.text

    return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8")
