"""docs/cli.md is what the parsers say."""

from pathlib import Path

from minicpm_edge.cli.reference import reference

ROOT = Path(__file__).resolve().parents[3]


def test_the_command_reference_is_current():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m minicpm_edge.cli.reference > docs/cli.md"
