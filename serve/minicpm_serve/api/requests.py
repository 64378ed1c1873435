"""What clients may ask for: the bodies of ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/embeddings``.

The rule for what this server cannot do: a parameter that would change the answer is refused by name, unless it has the
value that changes nothing (``n=1``, ``presence_penalty=0``, ``tools=[]``). A parameter that only informs OpenAI's own
service (``user``, ``store``, …) is accepted and has no effect. A name nobody knows is refused, with the nearest known
one, so that a typing error never passes for a setting. ``top_k`` and ``min_p`` are ours (``extra_body`` in the client).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minicpm_edge.engines.sampling_params import LIMITS, MAX_STOP_LENGTH, SamplingParams
from minicpm_serve.api.errors import ApiError

MAX_MESSAGES, MAX_PARTS, MAX_INPUTS, MAX_STOP = 4096, 256, 2048, 4

WITHOUT_EFFECT = frozenset(
    {
        "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user",
    }
)  # fmt: skip

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "dimensions": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters of OpenAI's API that are not served yet, with the values (beside null) that ask for nothing."""

_STRICT = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)


def _within(name: str, *, high: int | None = None) -> Any:
    """An optional setting within the engine's limits; OpenAI's API ends some of them earlier, at ``high``."""
    return Field(None, ge=LIMITS[name].low, le=LIMITS[name].high if high is None else high)


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = _STRICT
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against traffic analysis on shared networks; accepted, and never added."""


class TextPart(BaseModel):
    """One text part of a message's content."""

    model_config = _STRICT
    type: str
    text: str = ""


class Message(BaseModel):
    """One turn. A message that this server answered with can be sent back as it is: its null fields ask for nothing."""

    model_config = _STRICT
    role: str
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None


class Sampling(BaseModel):
    """What both completion routes share."""

    model_config = _STRICT
    model: str | None = None
    max_tokens: int | None = _within("max_tokens")
    temperature: float | None = _within("temperature", high=2)
    top_p: float | None = _within("top_p")
    top_k: int | None = _within("top_k")
    min_p: float | None = _within("min_p")
    stop: str | list[str] | None = None
    seed: int | None = _within("seed", high=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def usage_wanted(self) -> bool:
        """Whether the stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> SamplingParams:
        """The settings as the engine takes them; what the client left out has the engine's defaults."""
        given: dict[str, Any] = {
            "max_tokens": self.token_limit(),
            "temperature": self.temperature,
            # 0 keeps only the likeliest token, and so does anything as small; the engine wants it above 0.
            "top_p": None if self.top_p is None else max(self.top_p, 1e-6),
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": _stop_strings(self.stop),
        }
        return SamplingParams.of(**{name: value for name, value in given.items() if value is not None})

    def token_limit(self) -> int | None:
        """Most tokens to answer with; None for as many as the context has room for."""
        return self.max_tokens


class ChatRequest(Sampling):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = _within("max_tokens")

    def token_limit(self) -> int | None:
        """``max_completion_tokens``, or ``max_tokens``, its older name."""
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> list[dict[str, object]]:
        """The messages as chat templates read them: role and plain text."""
        return [_plain(message, f"messages.{index}") for index, message in enumerate(self.messages)]


class CompletionRequest(Sampling):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def token_limit(self) -> int:
        """OpenAI's own default for this older route is 16."""
        return self.max_tokens or 16

    def single_prompt(self) -> str | list[int]:
        """The one prompt, as text or as token ids. Raises where there are several or none."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(
                    400, "prompt: give one prompt a request; several are not supported", param="prompt"
                )
            prompt = prompt[0]
        if isinstance(prompt, int) or not prompt:
            raise ApiError(400, "prompt: it is empty; give text, or a list of token ids", param="prompt")
        return prompt  # type: ignore[return-value]


class EmbeddingRequest(BaseModel):
    """Body of ``POST /v1/embeddings``."""

    model_config = _STRICT
    model: str | None = None
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"

    def texts(self) -> list[str]:
        """What to embed. Raises where a text is empty."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not all(texts):
            raise ApiError(400, "input: a text is empty", param="input")
        return texts


Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The request's JSON as ``kind``.

    Raises:
        ApiError: for another content type, broken JSON, a wrong value (``param`` names it), an unknown or unsupported
            parameter.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Also a guard: a web form on another site can post text/plain, never application/json, without a preflight.
    if content_type != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    try:
        body = kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise _first_problem(error) from None
    _refuse_unsupported(body.model_extra or {}, known=kind.model_fields)
    return body


def _first_problem(error: ValidationError) -> ApiError:
    # Where several shapes are possible (prompt), pydantic lists each shape's complaint. The first field is what counts,
    # and there the shape that fits best: whose complaint is of an item, or of anything but the whole value's type.
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    problem = max(
        (problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]),
        key=lambda problem: (len(problem["loc"]), not problem["type"].endswith("_type")),
    )
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}")
    param = ".".join(_path(problem["loc"]))
    if problem["type"] == "missing":
        return ApiError(
            400, f"{param}: this parameter is required", param=param, code="missing_required_parameter"
        )
    message = problem["msg"].removeprefix("Input ").removeprefix("List ").replace(" after validation", "")
    return ApiError(
        400, f"{param or 'the body'}: the value {message}", param=param or None, code="invalid_value"
    )


def _path(location: Sequence[int | str]) -> list[str]:
    """pydantic's location without the names of the union's branches, which mean nothing to a client."""
    return [
        str(step) for step in location if isinstance(step, int) or (step.isidentifier() and step != "str")
    ]


def _refuse_unsupported(extra: Mapping[str, Any], *, known: Mapping[str, object]) -> None:
    for name, value in extra.items():
        if name in WITHOUT_EFFECT or (
            name in NEUTRAL and (value is None or _equals_any(value, NEUTRAL[name]))
        ):
            continue
        if name in NEUTRAL:
            neutral = " or ".join(f"{item!r}" for item in NEUTRAL[name])
            remedy = f"leave it out or set it to {neutral}" if neutral else "leave it out"
            raise ApiError(
                400,
                f"{name}: not supported by this server; {remedy}",
                param=name,
                code="unsupported_parameter",
            )
        near = difflib.get_close_matches(name[:100], [*known, *NEUTRAL, *WITHOUT_EFFECT], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ApiError(
            400, f"{name[:100]}: no such parameter{hint}", param=name[:100], code="unknown_parameter"
        )


def _equals_any(value: object, neutral: Sequence[object]) -> bool:
    # `False == 0` in Python, but a boolean for a number is a mistake worth telling.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


def _plain(message: Message, param: str) -> dict[str, object]:
    if message.role == "developer":  # OpenAI's newer name for the same thing
        role = "system"
    elif message.role in ("system", "user", "assistant"):
        role = message.role
    else:
        raise ApiError(
            400,
            f"{param}.role: {message.role[:40]!r} is not supported; use system, developer, user or assistant",
            param=f"{param}.role",
            code="invalid_value",
        )
    for name, value in (message.model_extra or {}).items():
        if value not in (None, [], {}):
            field = f"{param}.{name[:100]}"
            raise ApiError(
                400, f"{field}: not supported by this server", param=field, code="unsupported_parameter"
            )
    return {"role": role, "content": _text(message.content, f"{param}.content")}


def _text(content: str | list[TextPart] | None, param: str) -> str:
    if content is None:
        raise ApiError(400, f"{param}: the message has no content", param=param, code="invalid_value")
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type != "text":
            field = f"{param}.{index}.type"
            raise ApiError(
                400,
                f"{field}: this model reads text, not {part.type[:40]!r}",
                param=field,
                code="invalid_value",
            )
    return "".join(part.text for part in content)


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...] | None:
    strings = [stop] if isinstance(stop, str) else stop or []
    if len(strings) > MAX_STOP or any(len(string) > MAX_STOP_LENGTH for string in strings):
        message = f"stop: give at most {MAX_STOP} strings, of at most {MAX_STOP_LENGTH} characters"
        raise ApiError(400, message, param="stop", code="invalid_value")
    # Some clients send "" for "none"; it could only ever stop everything.
    return tuple(string for string in strings if string) or None
