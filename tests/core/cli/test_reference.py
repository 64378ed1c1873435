"""docs/cli.md is what the parsers say."""

import argparse
from pathlib import Path

import pytest

from minicpm_edge.cli.command import Command
from minicpm_edge.cli.main import build_parser
from minicpm_edge.cli.reference import reference

ROOT = Path(__file__).resolve().parents[3]


def test_the_command_reference_is_current():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m minicpm_edge.cli.reference > docs/cli.md"


@pytest.mark.parametrize(
    ("option", "row"),
    [
        ({"action": "store_true"}, "`--x`"),
        ({"action": "store_const", "const": 3}, "`--x`"),
        ({"action": "append_const", "const": 3}, "`--x`"),
        ({"action": "count"}, "`--x`"),
        ({"action": argparse.BooleanOptionalAction}, "`--x, --no-x`"),
        ({"type": int}, "`--x X`"),
        ({"metavar": "N", "default": 3}, "`--x N`"),
        ({"nargs": 2, "metavar": ("LOW", "HIGH")}, "`--x LOW HIGH`"),
        ({"choices": ["a", "b"]}, "`--x a \\| b`"),
    ],
)
def test_only_an_option_that_takes_a_value_is_shown_with_one(monkeypatch, option, row):
    class Entry:
        @staticmethod
        def load():
            return Command(
                help="try",
                add_arguments=lambda parser: parser.add_argument(
                    "--x", help="100%% of %(default)s", **option
                ),
                run=lambda arguments: None,
            )

    monkeypatch.setattr("minicpm_edge.cli.main._find_commands", lambda: {"try": Entry()})
    default = build_parser().parse_args(["try"]).x
    assert f"| {row} | 100% of {default} |" in reference()
