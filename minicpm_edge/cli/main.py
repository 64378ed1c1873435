"""The ``minicpm-edge`` command: finds each part's commands by entry point and runs one.

The modules that register a :class:`~minicpm_edge.cli.command.Command` import nothing heavy, so ``--help`` loads
neither torch nor llama_cpp.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points, version

from minicpm_edge.cli.command import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, Command
from minicpm_edge.errors import UserError

GROUP = "minicpm_edge.commands"
ORDER = (
    "quickstart",
    "tokenizer",
    "data",
    "train",
    "decay",
    "eval",
    "export",
    "serve",
    "chat",
    "tunnel",
    "runs",
    "doctor",
)
OUT_OF_MEMORY = "error: out of memory; a smaller model, batch or context needs less"


def _find_commands() -> dict[str, EntryPoint]:
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    rank = {name: position for position, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command (also the source of docs/cli.md)."""
    parser = argparse.ArgumentParser(
        prog="minicpm-edge",
        description="From text to a small language model that answers on your own laptop or phone.",
    )
    parser.add_argument("--version", action="version", version=f"minicpm-edge {version('minicpm-edge')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, entry in _find_commands().items():
        command: Command = entry.load()
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        subparser.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
        command.add_arguments(subparser)
        subparser.set_defaults(run_command=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code (0, 1 error, 2 usage, 130 interrupted)."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:
        # argparse exits on --help (0) and on wrong usage (2).
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    return run_guarded(lambda: arguments.run_command(arguments), debug=arguments.debug)


def run_guarded(run: Callable[[], int | None], *, debug: bool) -> int:
    """Run a command and return its exit code; an error is one line on stderr, or with ``debug`` raised."""
    try:
        return run() or 0
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `minicpm-edge … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except MemoryError:
        print(OUT_OF_MEMORY, file=sys.stderr)
        return EXIT_ERROR
    except ImportError as error:
        if debug:
            raise
        print(f"error: {_missing_package(error)}", file=sys.stderr)
        return EXIT_ERROR
    except RuntimeError as error:
        # torch has no common class for a lack of memory: CPU and CUDA differ.
        if debug or not _is_out_of_memory(error):
            return _unexpected(error, debug)
        print(OUT_OF_MEMORY, file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        # A full disk, a folder that cannot be written: not a bug of ours.
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except Exception as error:  # noqa: BLE001
        # The last resort: a user sees one line, and all with --debug.
        return _unexpected(error, debug)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _unexpected(error: Exception, debug: bool) -> int:
    if debug:
        raise error
    text = (str(error).splitlines() or [""])[0]
    print(
        f"error: unexpected {type(error).__name__}: {text} (internal error; rerun with --debug)",
        file=sys.stderr,
    )
    return EXIT_ERROR


def _missing_package(error: ImportError) -> str:
    name = (error.name or str(error)).split(".")[0]
    return f"the package {name!r} is needed here: pip install 'minicpm-edge[all]'"


def entry() -> None:
    """Console-script entry."""
    for stream in (sys.stdout, sys.stderr):
        # In a locale without UTF-8 a name or a sign that it lacks must not end the command.
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
