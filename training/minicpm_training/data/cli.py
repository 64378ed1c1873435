"""The commands ``tokenizer`` and ``data``. Imports only what argparse needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from minicpm_edge.cli.command import Command

SAMPLE_BYTES = 200_000_000


def _whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value < 1 << 53:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {least} or more")
        return value

    return parse


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="a txt, md, jsonl, jsonl.gz, jsonl.zst or parquet file, a folder or a glob of them, "
        "or datasets:NAME[:CONFIG] for a dataset that the package `datasets` knows",
    )
    parser.add_argument(
        "--field", default="text", help="the text's name in JSON lines and tables (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show a traceback instead of one line"
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    help_text = "learn a byte-level BPE vocabulary from text"
    train = actions.add_parser("train", help=help_text, description=help_text)
    _add_sources(train)
    train.add_argument(
        "--vocab-size", type=_whole_number(1), default=8192, metavar="N", help="tokens (default: %(default)s)"
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="the tokenizer's folder")
    train.add_argument(
        "--sample-bytes",
        type=_whole_number(1),
        default=SAMPLE_BYTES,
        metavar="N",
        help="learn from about this much text, spread evenly over the sources (default: 200 MB)",
    )


def _train_tokenizer(arguments: argparse.Namespace) -> int:
    from minicpm_edge.atomic import atomic_folder
    from minicpm_edge.cli.progress import Progress
    from minicpm_edge.text.tokenizer import JSON_FILE, Tokenizer
    from minicpm_training.data.prepare import check_replaceable
    from minicpm_training.data.sample import Sample

    check_replaceable(arguments.out, JSON_FILE)
    sample = Sample(names=arguments.sources, field=arguments.field, max_bytes=arguments.sample_bytes)
    with Progress() as progress:
        tokenizer = Tokenizer.train(sample.texts(progress), arguments.vocab_size)
    with atomic_folder(arguments.out) as folder:
        tokenizer.save(folder)
    result = {
        "tokenizer": arguments.out.as_posix(),
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "sample_bytes": sample.num_bytes,
        "sample_documents": sample.num_documents,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{arguments.out}: {tokenizer.vocab_size:,} tokens, learned from {sample.num_documents:,} documents "
            f"({sample.num_bytes / 1e6:,.1f} MB)"
        )
    return 0


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    help_text = "turn text into a set of token shards for training"
    prepare = actions.add_parser("prepare", help=help_text, description=help_text)
    _add_sources(prepare)
    prepare.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="the tokenizer's folder"
    )
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="the set's folder")
    prepare.add_argument(
        "--workers", type=_whole_number(1), metavar="N", help="processes (default: one a core)"
    )


def _prepare(arguments: argparse.Namespace) -> int:
    import time

    from minicpm_training.data.prepare import prepare

    started = time.monotonic()
    manifest = prepare(
        arguments.sources,
        tokenizer=arguments.tokenizer,
        out=arguments.out,
        field=arguments.field,
        workers=arguments.workers,
    )
    if arguments.json:
        print(json.dumps(manifest, indent=2, ensure_ascii=False))
        return 0
    seconds = time.monotonic() - started
    print(
        f"{arguments.out}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens, "
        f"{manifest['num_bytes'] / 1e6:,.1f} MB of text in {seconds:.1f} s"
    )
    for report in manifest["sources"]:
        _print_skipped(report)
    return 0


def _print_skipped(report: dict[str, object]) -> None:
    skipped, examples, source = report["skipped"], report["examples"], report["source"]
    assert isinstance(skipped, dict)
    assert isinstance(examples, list)
    if skipped:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items())
        print(f"  skipped in {source}: {reasons}; the first: {examples[0]}")
    if not report["num_documents"]:
        print(f"  warning: nothing was taken from {source}")


TOKENIZER = Command(help="learn a tokenizer from text", add_arguments=_add_tokenizer, run=_train_tokenizer)
DATA = Command(help="prepare text for training", add_arguments=_add_data, run=_prepare)
