"""``minicpm-edge quickstart``."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm_edge.cli.command import Command
from minicpm_edge.errors import UserError

DEFAULT_MINUTES = 5.5


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        metavar="M",
        help="time to aim at; nearly all of it trains (default: %(default)s)",
    )


def _run(arguments: argparse.Namespace) -> None:
    if not 0.5 <= arguments.minutes <= 1e5:
        raise UserError(f"--minutes {arguments.minutes:g}: give at least 0.5")
    from minicpm_training.quickstart.pipeline import quickstart

    quickstart(arguments.out, minutes=arguments.minutes)


QUICKSTART = Command(
    help="the whole way on the text of Python's own library: train, export, certify, answer",
    add_arguments=_add_arguments,
    run=_run,
)
