"""Every --flag that shipped code advises exists, and belongs to the command that it is named with."""

import argparse
import ast
import re
import tomllib
from pathlib import Path

import pytest

from minicpm_edge.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
# `minicpm-edge train --resume`: the command, and what follows it up to the end of the line or span.
COMMAND = re.compile(r"minicpm-edge ([a-z]+(?: [a-z]+)?)((?: [^`\n]*)?)")
# Flags of other programs that a docstring or message names.
FOREIGN = {"--cpus": "docker run", "--steps": "python -m minicpm_training.studies.coordinate_check"}


def children(parser):
    """A parser's subcommands by name."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found[0].choices if found else {}


def options(parser):
    return {option for action in parser._actions for option in action.option_strings}


def parsers(parser, name=""):
    """(command as typed, parser) of a parser and all its subcommands."""
    yield name, parser
    for word, child in children(parser).items():
        yield from parsers(child, f"{name} {word}".strip())


COMMANDS = {name: options(parser) for name, parser in parsers(build_parser())}


def shipped_texts():
    """(file, text): every string of the shipped packages, f-strings put together, and their recipes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield file, node.value
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
                    yield file, "".join(parts)
        for file in (ROOT / package).rglob("*.toml"):
            yield file, file.read_text(encoding="utf-8")


def unknown_flags(text):
    """The flags in a text that no parser has, or not the one of the command that they stand behind."""
    known = set().union(*COMMANDS.values(), FOREIGN)
    found = {flag for flag in FLAG.findall(text) if flag not in known}
    for words, rest in COMMAND.findall(text):
        named = [name for name in COMMANDS if f"{words} ".startswith(f"{name} ")]
        command = max(named, key=len, default="")
        found |= {f"{command} {flag}" for flag in FLAG.findall(rest) if flag not in COMMANDS[command]}
    return found


def test_every_flag_in_a_message_or_docstring_exists():
    texts = list(shipped_texts())
    assert sum(bool(FLAG.search(text)) for _, text in texts) > 100
    assert {(str(file), flag) for file, text in texts for flag in unknown_flags(text)} == set()


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("leave --granite out", {"--granite"}),
        ("give --quant, or `minicpm-edge train --resume`; -- a --- b", set()),
        ("run `minicpm-edge serve --quant Q8_0` then", {"serve --quant"}),
        ("`minicpm-edge data prepare --tokenizer T`", set()),
    ],
)
def test_a_flag_that_does_not_exist_is_found(text, unknown):
    assert unknown_flags(text) == unknown
