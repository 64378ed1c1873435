"""``minicpm-edge tokenizer train`` and ``minicpm-edge data prepare``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from minicpm_edge.cli import Command
from minicpm_edge.errors import UserError

DEFAULT_VOCAB_SIZE = 8192
DEFAULT_SAMPLE_BYTES = 200_000_000


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="txt, md, jsonl(.gz .zst), parquet; folders, patterns, a datasets name",
    )
    parser.add_argument("--field", default="text", help="a row's field with the text (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    train = parser.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "train",
        help="learn a byte-level BPE",
        description="learn a byte-level BPE that llama.cpp reads identically",
    )
    _add_sources(train)
    train.add_argument(
        "--vocab-size",
        type=int,
        default=DEFAULT_VOCAB_SIZE,
        metavar="N",
        help="tokens (default: %(default)s)",
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    train.add_argument(
        "--sample-bytes",
        type=int,
        default=DEFAULT_SAMPLE_BYTES,
        metavar="N",
        help="learn from at most this much text, from the head of each source alike (default: %(default)s)",
    )
    train.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    from minicpm_edge.atomic import atomic_folder
    from minicpm_edge.progress import Progress
    from minicpm_edge.tokenizer import Tokenizer
    from minicpm_training.data.report import Report

    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; give another --out, or remove it to train again")
    if arguments.sample_bytes < 1:
        raise UserError(f"--sample-bytes {arguments.sample_bytes}: give at least 1")
    report = Report()
    with Progress() as progress:
        texts = _sample(arguments.sources, arguments.field, arguments.sample_bytes, report, progress)
        tokenizer = Tokenizer.train(texts, arguments.vocab_size)
    with atomic_folder(arguments.out) as folder:
        tokenizer.save(folder)
    result = {"out": str(arguments.out), "vocab_size": tokenizer.vocab_size, "report": report.to_dict()}
    if arguments.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(
        f"{arguments.out}: {tokenizer.vocab_size:,} tokens, learnt from {report.text_bytes / 1e6:,.1f} MB of text"
    )
    print("\n".join(report.lines()), end="\n" if report.skipped else "")


def _sample(
    sources: Sequence[str], field: str, num_bytes: int, report: object, progress: object
) -> Iterator[str]:
    """Texts of the head of every source, the same number of bytes of each."""
    from minicpm_edge.progress import Progress
    from minicpm_training.data.prepare import documents_of
    from minicpm_training.data.report import Report

    assert isinstance(report, Report) and isinstance(progress, Progress)
    found = False
    for number, source in enumerate(sources, start=1):
        budget = num_bytes * number // len(sources)  # what a short source leaves, the later ones may use
        for document in documents_of([source], field=field, report=report):
            found = True
            if document.messages:
                yield from (str(message["content"]) for message in document.messages)
            else:
                yield document.text
            progress.update(f"reading  {report.documents:,} documents  {report.text_bytes / 1e6:,.1f} MB")
            if report.text_bytes >= budget:
                break
    if not found:
        detail = "; ".join(report.lines()) or "they are empty"
        raise UserError(f"nothing in {', '.join(sources)} can be used: {detail}")
    progress.update("learning merges")


def _add_data(parser: argparse.ArgumentParser) -> None:
    prepare = parser.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "prepare", help="text to token shards", description="turn text and chats into token shards"
    )
    _add_sources(prepare)
    prepare.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="the tokenizer's folder"
    )
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    prepare.add_argument(
        "--workers", type=int, metavar="N", help="processes that encode (default: one a core)"
    )
    prepare.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def _prepare(arguments: argparse.Namespace) -> None:
    from minicpm_edge.progress import Progress
    from minicpm_training.data.prepare import prepare

    if arguments.workers is not None and not 1 <= arguments.workers <= 1024:
        raise UserError(f"--workers {arguments.workers}: give a number from 1 to 1024")
    with Progress() as progress:
        done = prepare(
            arguments.sources,
            tokenizer_folder=arguments.tokenizer,
            out=arguments.out,
            field=arguments.field,
            workers=arguments.workers,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(done.manifest, indent=2, ensure_ascii=False))
        return
    manifest = done.manifest
    print(
        f"{arguments.out}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens, "
        f"{manifest['num_bytes'] / 1e6:,.1f} MB of text in {done.seconds:.1f} s"
    )
    print("\n".join(done.report.lines()), end="\n" if done.report.skipped else "")


TOKENIZER = Command(help="learn a tokenizer from text", add_arguments=_add_tokenizer, run=_train_tokenizer)
DATA = Command(help="turn text into token shards", add_arguments=_add_data, run=_prepare)
