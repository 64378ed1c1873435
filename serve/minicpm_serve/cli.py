"""The commands ``serve`` and ``chat``. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_edge.cli.command import Command
from minicpm_edge.engines.sampling_params import SamplingOptions, SamplingParams
from minicpm_edge.errors import UserError

if TYPE_CHECKING:
    from minicpm_edge.language_model import LanguageModel


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a run, checkpoint, Hugging Face folder, .gguf or ONNX folder",
    )
    parser.add_argument(
        "--context-length", type=int, metavar="N", help="most tokens of prompt and answer together"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads to compute with")


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument(
        "--port", type=int, default=8080, help="port to listen on (default 8080; 0 takes a free one)"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys that open the API, one a line"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="answer to this name too"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="let this site's pages use the API (CORS)",
    )
    parser.add_argument("--model-name", metavar="NAME", help="the model's name in the API (default: its own)")
    parser.add_argument(
        "--max-waiting", type=int, default=16, metavar="N", help="requests that may wait (default 16)"
    )


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument(
        "-p", "--prompt", metavar="TEXT", help="answer this once and exit; - reads standard input"
    )
    parser.add_argument(
        "--json", action="store_true", help="with -p: print text and token counts as one JSON object"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 always takes the likeliest token")
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="choose among the likeliest tokens of this share"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="choose among this many tokens; 0 among all")
    parser.add_argument(
        "--min-p", type=float, metavar="X", help="drop tokens below this share of the likeliest one's"
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end an answer before this text")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")


def _serve(arguments: argparse.Namespace) -> None:
    from minicpm_serve import server
    from minicpm_serve.app import create_app
    from minicpm_serve.settings import ServerSettings, read_keys

    settings = ServerSettings(
        host=arguments.host,
        port=arguments.port,
        api_keys=read_keys(arguments.api_key_file),
        allowed_hosts=tuple(arguments.allow_host),
        allowed_origins=tuple(arguments.allow_origin),
        model_name=arguments.model_name,
        max_waiting=arguments.max_waiting,
    )
    with (
        server.listen(settings) as listener,
        _load(arguments) as language_model,
        _watch(arguments, language_model) as problem,
    ):
        address = server.url(settings, listener)
        name = settings.model_name or language_model.name
        announce = f"{name} is ready at {address} (API: {address}/v1; Ctrl-C stops)"
        server.run(create_app(language_model, settings), listener, announce=announce, problem=problem)


def _chat(arguments: argparse.Namespace) -> None:
    from minicpm_serve import terminal

    if arguments.json and arguments.prompt is None:
        raise UserError("--json prints one answer, so it goes with -p TEXT")
    options = vars(arguments)
    given: dict[str, Any] = {
        name: options[name] for name in SamplingOptions.__annotations__ if options[name] is not None
    }
    params = SamplingParams.of(**given)
    terminal.prepare_streams()
    with _load(arguments) as language_model, _watch(arguments, language_model):
        conversation = terminal.Conversation(model=language_model, params=params, system=arguments.system)
        if arguments.prompt is None:
            terminal.chat_loop(conversation)
        else:
            terminal.answer_once(conversation, arguments.prompt, as_json=arguments.json)


def _load(arguments: argparse.Namespace) -> LanguageModel:
    from minicpm_edge.load import load

    return load(arguments.model, context_length=arguments.context_length, threads=arguments.threads)


@contextmanager
def _watch(
    arguments: argparse.Namespace, language_model: LanguageModel
) -> Iterator[Callable[[], str | None]]:
    """A function that tells why the loaded model can no longer be used, None while it can."""
    if language_model.backend != "llama_cpp":
        yield lambda: None
        return
    from minicpm_edge.formats.resolve import resolve_model
    from minicpm_serve.mapped_file import MappedFile

    with MappedFile(resolve_model(arguments.model, demo=True).path).guarded() as mapped:
        yield mapped.problem


SERVE = Command(
    help="serve a model: an OpenAI-compatible API, and a chat page for the browser",
    add_arguments=_add_serve_arguments,
    run=_serve,
)
CHAT = Command(help="chat with a model in the terminal", add_arguments=_add_chat_arguments, run=_chat)
