"""One model in three runtimes: torch, the exported GGUF in llama.cpp, the exported graph in ONNX Runtime."""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from minicpm_edge import load
from minicpm_edge.language_model import LanguageModel

Models = dict[str, LanguageModel]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    for package in ("torch", "llama_cpp", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    folder = _make_checkpoint(tmp_path_factory.mktemp("model"))
    gguf, graph = folder.parent / "model.gguf", folder.parent / "graph"
    _export(folder, "--gguf", gguf)
    _export(folder, "--onnx", graph)
    with ExitStack() as stack:
        yield {
            model.backend: stack.enter_context(model)
            for model in (load(path, threads=1) for path in (folder, gguf, graph))
        }


def _export(folder: Path, form: str, out: Path) -> None:
    from minicpm_export.cli import EXPORT

    parser = argparse.ArgumentParser()
    EXPORT.add_arguments(parser)
    assert not EXPORT.run(parser.parse_args([str(folder), form, "--quant", "F32", "--out", str(out)]))


def _make_checkpoint(folder: Path) -> Path:
    from minicpm_edge.formats.checkpoint import save_checkpoint
    from minicpm_edge.model.config import ModelConfig
    from minicpm_edge.model.transformer import MiniCPM
    from minicpm_edge.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(pydoc_data.topics.topics.values(), 512)
    tokenizer.save(folder / "tokenizer")
    config = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        # Scales that are nobody's default and logits far apart, so that agreement means something.
        scale_emb=5.0,
        scale_depth=1.1,
        dim_model_base=32.0,
        initializer_range=0.4,
        tie_word_embeddings=False,  # tied, random weights repeat the last token for ever
    )
    model = MiniCPM(config)
    model.init_weights(seed=3)
    save_checkpoint(folder / "checkpoint", model, tokenizer=folder / "tokenizer")
    return folder / "checkpoint"


def test_they_are_three(models):
    assert set(models) == {"torch", "llama_cpp", "onnx"}
    assert {model.context_length for model in models.values()} == {1024}


@pytest.mark.parametrize(
    "text",
    ["", "def f(x):\n\treturn x", "naïve 漢字 🙂 العربية", "<|im_end|> </s> <s>", " " * 300, "a\r\n\x00\x7f"],
)
def test_they_read_alike(models, text):
    messages = [{"role": "system", "content": text}, {"role": "user", "content": f"<|im_start|>{text}"}]
    for ask in (
        lambda model: model.tokenize(text),
        lambda model: model.tokenize(text, special=True),
        lambda model: model.text_prompt(text),
        lambda model: model.chat_prompt(messages),
    ):
        answers = [ask(model) for model in models.values()]
        assert answers[0] == answers[1] == answers[2]
    assert all(model.detokenize(model.tokenize(text)) == text for model in models.values())


@pytest.mark.parametrize("length", [3, 130, 300])
def test_they_answer_alike(models, length):
    prompt = models["torch"].tokenize(pydoc_data.topics.topics["assert"])[:length]
    answers = {}
    for backend, model in models.items():
        tokens = model._engine._runner.tokens(prompt, _greedy(), lambda: False)
        answers[backend] = [token for token, _ in zip(tokens, range(20), strict=False)]
    assert len(set(answers["torch"])) > 3  # not a model that repeats itself
    assert answers["torch"] == answers["onnx"] == answers["llama_cpp"]


def test_they_end_alike(models):
    assert len({model._engine.stop_token_ids for model in models.values()}) == 1


def test_they_embed_alike(models):
    ours, theirs = (
        models[backend].embed("the statement raises an exception") for backend in ("torch", "llama_cpp")
    )
    assert sum(a * b for a, b in zip(ours, theirs, strict=True)) == pytest.approx(1, abs=1e-3)


def _greedy():
    from minicpm_edge.engines.sampling_params import SamplingParams

    return SamplingParams(temperature=0)
