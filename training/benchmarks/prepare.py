"""``data prepare`` beside `datasets` + `tokenizers` doing the same: a file of JSON lines to one file of token ids.

The peer is the usual recipe: ``load_dataset("json")``, ``map`` with a batched ``encode_batch_fast`` in as many
processes, ids concatenated into a file. Both take turns in the same run; nothing is reported unless both give the
same ids. Rates are by the wall clock, and by processor time, which other work on the machine disturbs less.

    python training/benchmarks/prepare.py FILE.jsonl.zst [--megabytes N] [--rounds N]
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "prepare.json"
VOCAB_SIZE = 8192
MAX_DOCUMENT = 1_000_000  # characters; on much longer ones the peer is several times slower yet
PACKAGES = ("minicpm-edge", "datasets", "tokenizers", "pyarrow", "numpy")


def read_lines(file: Path) -> Iterator[str]:
    import pyarrow as pa

    with pa.input_stream(str(file)) as stream:
        yield from io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8")


def write_sample(source: Path, target: Path, megabytes: float) -> int:
    """About ``megabytes`` of text, every k-th document, as JSON lines compressed like ``source``; its bytes."""
    import pyarrow as pa

    sizes = [
        len(json.loads(line)["text"].encode()) for line in read_lines(source) if len(line) < MAX_DOCUMENT
    ]
    step = max(1, round(sum(sizes) / (megabytes * 1e6)))
    with pa.output_stream(str(target)) as stream:
        kept = (line for line in read_lines(source) if len(line) < MAX_DOCUMENT)
        for number, line in enumerate(kept):
            if number % step == 0:
                stream.write(line.encode())
    return sum(sizes[::step])


def ours(source: Path, tokenizer: Path, folder: Path, workers: int) -> Path:
    from minicpm_training.data.prepare import prepare

    prepare([str(source)], tokenizer=tokenizer, out=folder / "set", workers=workers)
    return folder / "set" / "tokens-00000.bin"


def theirs(source: Path, tokenizer: Path, folder: Path, workers: int) -> Path:
    import datasets
    import numpy as np
    import tokenizers

    datasets.disable_progress_bars()
    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        backend.encode_special_tokens = True  # here, because pickling it for a worker process forgets that
        encodings = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[bos, *encoding.ids, eos] for encoding in encodings]}

    data = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(folder), num_proc=None
    )
    num_proc = workers if workers > 1 else None
    data = data.map(encode, batched=True, num_proc=num_proc, remove_columns=data.column_names)
    target = folder / "tokens.bin"
    with target.open("wb") as stream:
        for batch in data.with_format("numpy").iter(1000):
            stream.write(np.concatenate(batch["ids"]).astype("<u2").tobytes())
    return target


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def timed(
    run: Callable[[Path, Path, Path, int], Path], source: Path, tokenizer: Path, workers: int
) -> tuple[float, float, bytes]:
    """(wall seconds, processor seconds, the ids as bytes) of one run in a folder of its own."""
    folder = Path(tempfile.mkdtemp())
    try:
        wall, processor = time.perf_counter(), processor_seconds()
        target = run(source, tokenizer, folder, workers)
        wall, processor = time.perf_counter() - wall, processor_seconds() - processor
        return wall, processor, target.read_bytes()
    finally:
        shutil.rmtree(folder)


def compare(source: Path, num_bytes: int, tokenizer: Path, workers: int, rounds: int) -> dict[str, object]:
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "datasets + tokenizers": []}
    for _ in range(rounds):
        ids = []
        for name, run in (("ours", ours), ("datasets + tokenizers", theirs)):
            wall, processor, content = timed(run, source, tokenizer, workers)
            times[name].append((wall, processor))
            ids.append(content)
        if ids[0] != ids[1]:
            sys.exit("the two give different ids: nothing to compare")
    rates: dict[str, dict[str, float]] = {}
    for name, pairs in times.items():
        wall, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
        rates[name] = {
            "megabytes_per_second": round(num_bytes / 1e6 / wall, 2),
            "megabytes_per_second_per_core": round(num_bytes / 1e6 / wall / workers, 2),
            "megabytes_per_processor_second": round(num_bytes / 1e6 / processor, 2),
        }
    ratios = {
        key: round(rates["ours"][key] / rates["datasets + tokenizers"][key], 2)
        for key in ("megabytes_per_second", "megabytes_per_processor_second")
    }
    return {"workers": workers, **rates, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON lines with a text field, .jsonl.zst or .jsonl.gz")
    parser.add_argument(
        "--megabytes", type=float, default=60.0, help="of text to take (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    arguments = parser.parse_args()
    if not arguments.file.is_file():
        print(f"skipped: {arguments.file} is not there")
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism, for both alike
    os.environ["HF_DATASETS_OFFLINE"] = "1"

    from minicpm_edge.text.tokenizer import Tokenizer

    folder = Path(tempfile.mkdtemp())
    try:
        source = folder / ("sample.jsonl" + arguments.file.suffix)
        num_bytes = write_sample(arguments.file, source, arguments.megabytes)
        texts = (json.loads(line)["text"][:20_000] for line in read_lines(source))
        Tokenizer.train(texts, VOCAB_SIZE).save(folder / "tokenizer")
        results = []
        for workers in arguments.workers:
            results.append(compare(source, num_bytes, folder / "tokenizer", workers, arguments.rounds))
            print(json.dumps(results[-1], indent=2), flush=True)
    finally:
        shutil.rmtree(folder)
    RESULTS.parent.mkdir(exist_ok=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "hardware": {
            "platform": platform.platform(),
            "num_cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {package: version(package) for package in PACKAGES},
        "corpus": {"name": arguments.file.name, "num_bytes": num_bytes, "vocab_size": VOCAB_SIZE},
        "rounds": arguments.rounds,
        "results": results,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
