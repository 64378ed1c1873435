"""The steps of the quickstart. Each leaves a folder or file that appears whole; the next run skips what is there.

Every step but the corpus is an ordinary command, printed as it runs, so that the reader can type it with text of
their own.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minicpm_edge.atomic import atomic_folder, write_text
from minicpm_edge.cli.command import EXIT_INTERRUPTED
from minicpm_edge.cli.main import main
from minicpm_edge.errors import UserError
from minicpm_edge.formats.resolve import resolve_model

VOCAB_SIZE = 4096
QUANTS = ("Q4_K_M", "Q4_0", "Q8_0")  # the first that the model's rows allow
SHARE_OF_DECAY = 0.2  # of the tokens; the paper finds 10 % enough for long runs, and this run is very short
SECONDS_AFTER_TRAINING = 35  # export, certificate, answers
NUM_ANSWERS = 3

RECIPE = """\
# Written by `minicpm-edge quickstart`: two stages, WSD. Token counts fit the time asked for on this machine.
name = "quickstart"
batch_tokens = {batch_tokens}
micro_batch_tokens = {batch_tokens}

[model]
preset = "tiny"
max_position_embeddings = {sequence_length}

[data]
tokenizer = {tokenizer}
sequence_length = {sequence_length}
stable = [{{ path = {source}, weight = 1.0 }}]
decay = [
    {{ path = {source}, weight = 0.3 }},
    {{ path = {docs}, weight = 0.3 }},
    {{ path = {chats}, weight = 0.4 }},
]
valid = [{{ path = {valid}, name = "held-out docs" }}]

[schedule]
peak_lr = 0.01
stable_tokens = {stable_tokens}
decay_tokens = {decay_tokens}

[checkpoint]
every = {checkpoint_every}

[evaluation]
every = {evaluation_every}
"""
SEQUENCE_LENGTH, BATCH_TOKENS = 512, 4096


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies under the output folder."""

    out: Path

    @property
    def corpus(self) -> Path:
        return self.out / "corpus"

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @property
    def recipe(self) -> Path:
        return self.out / "recipe.toml"

    @property
    def run(self) -> Path:
        return self.out / "run"

    def corpus_file(self, name: str) -> Path:
        return self.corpus / f"{name}.jsonl"

    def data(self, name: str) -> Path:
        return self.out / "data" / name


def quickstart(out: Path, *, minutes: float) -> None:
    """Run or resume the quickstart in ``out``; raises :class:`UserError` where a step fails."""
    started = time.monotonic()
    where = Layout(out=out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give another folder with --out")
    _step("corpus: Python's standard library", where.corpus, lambda: _corpus(where))
    _step("tokenizer", where.tokenizer, lambda: _tokenizer(where))
    for name in ("source", "docs", "chats", "docs.valid"):
        _step(f"tokenized dataset: {name}", where.data(name), partial(_prepare, where, name))
    deadline = started + minutes * 60 - SECONDS_AFTER_TRAINING
    _step("recipe for this machine", where.recipe, lambda: _recipe(where, deadline - time.monotonic()))
    _train(where, max(5.0, deadline - time.monotonic()))
    model = _export(where)
    answers = _answers(where, model)
    _report(where, model, answers, seconds=time.monotonic() - started)


def _step(title: str, result: Path, make: Callable[[], object]) -> None:
    if result.exists():
        print(f"— {title}: done before, in {result}", flush=True)
    else:
        print(f"— {title}", flush=True)
        make()


def _command(*words: str | Path) -> None:
    """Run one of our commands in this process, showing it as one would type it."""
    argv = [str(word) for word in words]
    print(f"  $ minicpm-edge {shlex.join(argv)}", flush=True)
    code = main(argv)
    if code == EXIT_INTERRUPTED:
        print("rerun the same command to resume the quickstart", flush=True)
        raise KeyboardInterrupt
    if code:
        raise UserError(
            f"`minicpm-edge {argv[0]}` failed, for the reason above; fix it, then rerun quickstart to resume"
        )


def _corpus(where: Layout) -> None:
    from minicpm_training.quickstart.corpus import write_corpus

    with atomic_folder(where.corpus) as folder:
        counts = write_corpus(folder)
    print("  " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))


def _tokenizer(where: Layout) -> None:
    sources = [where.corpus_file(name) for name in ("source", "docs")]
    _command("tokenizer", "train", *sources, "--vocab-size", str(VOCAB_SIZE), "--out", where.tokenizer)


def _prepare(where: Layout, name: str) -> None:
    _command(
        "data", "prepare", where.corpus_file(name), "--tokenizer", where.tokenizer, "--out", where.data(name)
    )


def _recipe(where: Layout, seconds: float) -> None:
    tokens_per_second = _measure_speed()
    steps = max(20, int(seconds * tokens_per_second / BATCH_TOKENS))
    decay_steps = max(4, round(steps * SHARE_OF_DECAY))
    paths = {"source": where.data("source"), "docs": where.data("docs"), "chats": where.data("chats")}
    paths |= {"valid": where.data("docs.valid"), "tokenizer": where.tokenizer}
    text = RECIPE.format(
        batch_tokens=BATCH_TOKENS,
        sequence_length=SEQUENCE_LENGTH,
        stable_tokens=(steps - decay_steps) * BATCH_TOKENS,
        decay_tokens=decay_steps * BATCH_TOKENS,
        checkpoint_every=max(10, steps // 10),
        evaluation_every=max(10, steps // 5),
        **{name: json.dumps(path.absolute().as_posix()) for name, path in paths.items()},
    )
    write_text(where.recipe, text)
    print(
        f"  {tokens_per_second:,.0f} tokens/s measured; {steps} steps of {BATCH_TOKENS} tokens fit the time"
    )


def _measure_speed(seconds: float = 6.0) -> float:
    """Tokens a second of the training step on this machine: the median over a few seconds of real steps."""
    import torch

    from minicpm_edge.model.presets import preset
    from minicpm_edge.model.transformer import MiniCPM
    from minicpm_training.hardware import choose_device, choose_precision, dtype_of

    device = choose_device("auto")
    precision = choose_precision("auto", device)
    model = MiniCPM(preset("tiny")).to(device)
    model.init_weights(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids_BT = torch.randint(
        0, VOCAB_SIZE, (BATCH_TOKENS // SEQUENCE_LENGTH, SEQUENCE_LENGTH + 1), device=device
    )
    inputs_BT, targets_BT = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()
    durations: list[float] = []
    while sum(durations) < seconds:
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype_of("bf16"), enabled=precision == "bf16"):
            loss = model.loss(inputs_BT, targets_BT)
        torch.autograd.backward(loss.total / loss.num_targets)
        optimizer.step()
        optimizer.zero_grad()
        loss.cross_entropy.item()  # waits for the device
        durations.append(time.perf_counter() - start)
    return BATCH_TOKENS / statistics.median(durations)


def _train(where: Layout, seconds: float) -> None:
    print("— train: the trunk on source code, then the decay with docs and chats mixed in", flush=True)
    # The recipe's tokens fit the speed just measured; on a machine that then gets busy, the time still holds.
    limit = ("--minutes", f"{seconds / 60:.2f}")
    if (where.run / "recipe.toml").is_file():
        _command("train", "--resume", where.run, *limit)
    else:
        _command("train", where.recipe, "--out", where.run, *limit)


def _export(where: Layout) -> Path:
    trained = (resolve_model(str(where.run)).path / "state.json").stat().st_mtime
    for quant in QUANTS:
        path = where.out / f"quickstart-{quant}.gguf"
        if path.exists() and path.stat().st_mtime > trained:  # older: the run has gone on since
            print(f"— export: done before, {path}", flush=True)
            return path
    print("— export", flush=True)
    for quant in QUANTS:
        path = where.out / f"quickstart-{quant}.gguf"
        argv = (
            "export",
            where.run,
            "--gguf",
            "--quant",
            quant,
            "--text",
            where.corpus_file("docs.valid"),
            "--out",
            path,
        )
        try:
            _command(*argv)
        except UserError:
            if quant == QUANTS[-1]:
                raise
            print(f"  {quant} failed verification, as shown above; trying the next type", flush=True)
        else:
            return path
    raise AssertionError("unreachable: the last type either returns or raises")


def _answers(where: Layout, model: Path) -> list[dict[str, str]]:
    """Sampled answers to questions that were held out of training, with the true ones."""
    from minicpm_edge.load import load

    answers = []
    with load(model) as language_model:
        for entry in _held_out_questions(where):
            messages = [{"role": "user", "content": entry["question"]}]
            text = language_model.chat(messages, max_tokens=60, temperature=0.3, seed=0)
            answers.append({**entry, "model": str(text).strip()})
    return answers


def _held_out_questions(where: Layout) -> list[dict[str, str]]:
    """The shortest ones with a one-sentence answer, spread over the alphabet: the same at every run."""
    lines = where.corpus_file("questions").read_text(encoding="utf-8").splitlines()
    entries: list[dict[str, str]] = [json.loads(line) for line in lines]
    short = sorted(
        (entry for entry in entries if len(entry["answer"]) < 120), key=lambda entry: len(entry["question"])
    )
    shortest = sorted(short[: 4 * NUM_ANSWERS], key=lambda entry: entry["question"])
    return shortest[:: max(1, len(shortest) // NUM_ANSWERS)][:NUM_ANSWERS]


def _report(where: Layout, model: Path, answers: list[dict[str, str]], *, seconds: float) -> None:
    before, after = _held_out_bits(where)
    report = {
        "model": model.as_posix(),
        "seconds": round(seconds, 1),
        "held_out_docs_bits_per_byte": {"before_decay": before, "after_decay": after},
        "answers": answers,
    }
    write_text(where.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print("\nResults")
    print(
        f"  held-out docs: {before:.3f} bits per byte before the decay stage, {after:.3f} after it "
        f"({before - after:+.3f} gained)"
    )
    print(f"  loss curve   : {where.run / 'loss.png'}")
    print(f"  model        : {model} ({model.stat().st_size / 1e6:.1f} MB), certificate beside it")
    print("\nQuestions held out of training, answered by the exported file")
    for answer in answers:
        print(f"  Q: {answer['question']}\n  A: {answer['model']}\n     (the docs: {answer['answer']})")
    print(
        "\nA model this small, trained for minutes, speaks the language of the docs and knows little. Next:"
    )
    file, run = shlex.quote(str(model)), shlex.quote(str(where.run))
    print(f"  minicpm-edge chat {file}")
    print(f"  minicpm-edge serve {file}")
    print(f"  minicpm-edge train --resume {run} --set schedule.stable_tokens=…    # continue the trunk")


def _held_out_bits(where: Layout) -> tuple[float, float]:
    """Bits per byte of the held-out docs where the exported decay branched off the trunk, and at its end."""
    from minicpm_training.run import Branch, open_run

    branch = Branch(folder=resolve_model(str(where.run)).path.parent.parent)
    if branch.folder.parent.name != "decays":
        raise UserError(f"{where.run} has no decay; remove {where.out} and run the quickstart again")
    after = branch.metrics()
    trunk = open_run(str(where.run)).trunk.metrics()
    return _last_bits([line for line in trunk if line["step"] < after[0]["step"]]), _last_bits(after)


def _last_bits(metrics: list[dict[str, Any]]) -> float:
    values = [line["valid"]["held-out docs"] for line in metrics if "valid" in line]
    return float(values[-1]) if values else math.nan
