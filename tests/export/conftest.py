"""Small models with fixed seeds, saved as checkpoints, for every export test."""

from __future__ import annotations

import dataclasses
import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_edge.model.config import ModelConfig

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before anything imports onnxruntime

# Widths that every type's blocks divide, a vocabulary larger than the tokenizer's, scales that are nobody's default.
SMALL = ModelConfig(
    vocab_size=520,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    scale_emb=9.0,
    scale_depth=0.9,
    dim_model_base=128.0,
)


@pytest.fixture(autouse=True)
def short_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows instead of eight: enough for small models, and quick."""
    from minicpm_export.verify import windows

    monkeypatch.setattr(windows, "NUM_WINDOWS", 2)
    monkeypatch.setattr(windows, "WINDOW_LENGTH", 160)


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    return SMALL


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from minicpm_edge.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(pydoc_data.topics.topics.values(), 512).save(folder)
    return folder


MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> MakeModel:
    """``make_model(**changes)``: the checkpoint folder of SMALL with these fields changed; made once each."""
    from minicpm_edge.formats.checkpoint import save_checkpoint
    from minicpm_edge.model.transformer import MiniCPM

    made: dict[str, Path] = {}

    def make(**changes: object) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            model = MiniCPM(dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]
            model.init_weights(seed=7)
            made[key] = tmp_path_factory.mktemp("model") / "model"
            save_checkpoint(made[key], model, tokenizer=tokenizer_folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def token_ids(tokenizer_folder: Path) -> list[int]:
    """100 tokens of text, with the begin token in front."""
    from minicpm_export.verify.windows import built_in_text

    from minicpm_edge.text.tokenizer import Tokenizer

    return Tokenizer.load(tokenizer_folder).encode(built_in_text(), bos=True)[:100]
