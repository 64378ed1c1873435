"""The commands of the training part. Only what argparse needs is imported here; work imports what it uses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minicpm_edge.cli.command import Command
from minicpm_training.data.cli import DATA, TOKENIZER
from minicpm_training.quickstart.cli import QUICKSTART

__all__ = ["DATA", "DECAY", "EVAL", "QUICKSTART", "RUNS", "TOKENIZER", "TRAIN", "TUNNEL"]


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace one value of the recipe, as in --set schedule.peak_lr=0.005; may be given again",
    )


def _add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def _add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="train by N processes of this machine, with a GPU each where there are any (default: %(default)s)",
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a TOML file, or a shipped recipe's name such as tiny"
    )
    _add_set(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run (default: --out, else the newest); --set may lengthen it",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="end the stable stage early and decay from there, so that all takes at most about M minutes",
    )
    _add_nproc(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    _add_json(parser, "the plan or the result")


def _train(arguments: argparse.Namespace) -> int:
    from minicpm_training.commands.train import train

    return train(arguments)


def _add_decay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name under runs/")
    parser.add_argument("--at", type=int, metavar="STEP", help="the trunk's checkpoint (default: the newest)")
    parser.add_argument(
        "--tokens", type=int, required=True, metavar="N", help="length of the decay in tokens"
    )
    parser.add_argument(
        "--data", metavar="RECIPE", help="take the decay's mixture (that of its last stage) from this recipe"
    )
    _add_set(parser)
    _add_nproc(parser)
    _add_json(parser, "the result")


def _decay(arguments: argparse.Namespace) -> int:
    from minicpm_training.commands.decay import decay

    return decay(arguments)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "root", nargs="?", type=Path, default=Path("runs"), help="where runs lie (%(default)s)"
    )
    _add_json(parser, "the list")


def _runs(arguments: argparse.Namespace) -> int:
    from minicpm_training.commands.runs import list_runs

    return list_runs(arguments)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a run, checkpoint or Hugging Face folder")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        type=Path,
        metavar="SET",
        help="tokenized datasets that `data prepare` made",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="at most this many tokens of each set")
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="sequence length (default: that of the run's recipe, or the context)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (%(default)s)")
    _add_json(parser, "the results")


def _eval(arguments: argparse.Namespace) -> int:
    from minicpm_training.commands.evaluate import evaluate

    return evaluate(arguments)


def _add_tunnel(parser: argparse.ArgumentParser) -> None:
    studies = parser.add_subparsers(dest="study", metavar="STUDY", required=True)
    lr = _add_study(
        studies, "lr", "the best learning rate over widths and depths, with and without muP's rules"
    )
    lr.add_argument(
        "--depths", nargs="+", type=int, default=(), metavar="L", help="default: the recipe's own"
    )
    lr.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=(0.0025, 0.005, 0.01, 0.02, 0.04),
        metavar="LR",
        help="base learning rates (default: 0.0025 to 0.04, doubling)",
    )
    lr.add_argument(
        "--rules",
        nargs="+",
        choices=("mup", "standard"),
        default=("mup", "standard"),
        help="width rules to compare (default: both)",
    )
    batch = _add_study(
        studies, "batch", "the batch size that reaches a loss with the fewest tokens, and its law"
    )
    batch.add_argument(
        "--batch-tokens", nargs="+", type=int, required=True, metavar="N", help="batch sizes; three at least"
    )
    scaling = _add_study(
        studies, "scaling", "loss over parameters and tokens; predicts a larger size, then trains it"
    )
    scaling.add_argument(
        "--held-out",
        type=int,
        required=True,
        metavar="WIDTH",
        help="the size to predict before it is trained",
    )
    scaling.add_argument(
        "--lengths",
        nargs="+",
        type=float,
        default=(10, 20, 30, 40, 50, 60),
        metavar="X",
        help="tokens per parameter (default: 10 to 60)",
    )
    scaling.add_argument(
        "--compute",
        type=float,
        default=1e21,
        metavar="FLOPS",
        help="where to give the best ratio (%(default)g)",
    )


def _add_study(studies: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = studies.add_parser(name, help=summary, description=summary)
    parser.add_argument(
        "recipe", metavar="RECIPE", help="what every trial has in common: a TOML file, or tiny"
    )
    parser.add_argument(
        "--widths",
        nargs="+",
        type=int,
        required=True,
        metavar="D",
        help="model widths, multiples of the head dim",
    )
    _add_set(parser)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of every trial (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trials at a time (%(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the study's folder (default: runs/tunnel-STUDY)"
    )
    parser.add_argument("--plan-only", action="store_true", help="list the trials and their cost, and stop")
    parser.add_argument(
        "--trial", type=int, metavar="I", help="train this one only, as another machine's share"
    )
    _add_json(parser, "the plan")
    return parser


def _tunnel(arguments: argparse.Namespace) -> int:
    from minicpm_training.commands.tunnel import tunnel

    return tunnel(arguments)


TRAIN = Command(help="train a model from a recipe, or resume a run", add_arguments=_add_train, run=_train)
DECAY = Command(help="branch a release off a trunk", add_arguments=_add_decay, run=_decay)
RUNS = Command(help="list runs and their decays", add_arguments=_add_runs, run=_runs)
EVAL = Command(help="bits per byte and perplexity on tokenized datasets", add_arguments=_add_eval, run=_eval)
TUNNEL = Command(
    help="wind tunnel: studies of learning rate, batch size and scaling",
    add_arguments=_add_tunnel,
    run=_tunnel,
)
