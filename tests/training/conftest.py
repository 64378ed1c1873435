"""A prepared workspace so small that a training step takes milliseconds, and a recipe that fits it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from minicpm_training import hardware
from minicpm_training.recipe.files import load_recipe
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Run
from minicpm_training.session import RunContext, train_run

from minicpm_edge.cli.progress import Progress
from minicpm_edge.text.tokenizer import Tokenizer

TEXT = "the cat sat on a mat and saw two birds sing in trees by the old house near a river"
WORDS = TEXT.split()


def write_set(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    """A prepared set of documents, in the format of minicpm_training.data.tokenized_dataset."""
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    starts = np.cumsum([0, *(len(ids) for ids in documents[:-1])]).astype(np.int64)
    ids = np.concatenate([np.asarray(ids) for ids in documents]).astype("<u2")
    folder.mkdir(parents=True)
    ids.tofile(folder / "tokens-00000.bin")
    np.save(folder / "documents-00000.npy", starts)
    manifest = {
        "format": 1,
        "dtype": "uint16",
        "has_mask": False,
        "shards": [{"num_tokens": len(ids)}],
        "num_tokens": len(ids),
        "num_documents": len(texts),
        "num_bytes": sum(len(text.encode()) for text in texts),
        "tokenizer_sha256": tokenizer.sha256,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def sentences(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(5, 40))) + "." for _ in range(count)]


@pytest.fixture(scope="session", autouse=True)
def _short_measurement() -> Iterator[None]:
    """A run measures the processor's peak for its MFU: here one matrix product will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "NUM_TRIALS", 1)
        yield


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``tok``, ``a``, ``b`` (repetitive), ``valid``."""
    root = tmp_path_factory.mktemp("workspace")
    tokenizer = Tokenizer.train(sentences(0, 400), 300)
    tokenizer.save(root / "tok")
    write_set(root / "a", tokenizer, sentences(1, 400))
    write_set(root / "b", tokenizer, ["one two three four five six seven eight nine ten. " * 3] * 100)
    write_set(root / "valid", tokenizer, sentences(2, 60))
    return root


@pytest.fixture
def make_recipe(workspace: Path) -> Callable[..., Recipe]:
    """The small recipe with ``--set`` settings on top: 20 stable steps of 128 tokens, no decay, fp32."""
    entries = {
        "name": "small",
        "batch_tokens": 128,
        "micro_batch_tokens": 64,
        "precision": "fp32",
        "device": "cpu",
        "model": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "dim_model_base": 32,
        },
        "data": {
            "tokenizer": str(workspace / "tok"),
            "sequence_length": 32,
            "stable": [{"path": str(workspace / "a")}],
            "decay": [{"path": str(workspace / "a")}, {"path": str(workspace / "b"), "weight": 2.0}],
        },
        "schedule": {"stable_tokens": 20 * 128, "warmup_tokens": 3 * 128},
        "checkpoint": {"every": 5, "keep_every": 5},
    }
    return lambda *settings: load_recipe(entries, settings)


@pytest.fixture
def train() -> Callable[[Recipe, Path], Run]:
    """Train a recipe in a folder, or go on there; on one thread, as the subprocess tests do."""

    def run_it(recipe: Recipe, folder: Path) -> Run:
        run = Run(folder=folder)
        with open_null() as stream:
            assert train_run(recipe, run, RunContext(progress=Progress(stream)))
        return run

    def open_null():
        import os

        return Path(os.devnull).open("w", encoding="utf-8")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run_it
    torch.set_num_threads(threads)


@pytest.fixture
def same_checkpoint() -> Callable[[Path, Path], bool]:
    """Whether two checkpoints hold the same weights and optimizer state, bit for bit."""

    def same(first: Path, second: Path) -> bool:
        files = ("model.safetensors", "optimizer.safetensors")
        return all((first / file).read_bytes() == (second / file).read_bytes() for file in files)

    return same
