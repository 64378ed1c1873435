"""The tokenizer: every string comes back, special tokens cannot be forged, other programs agree on the ids."""

import json
import random
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_edge.errors import UserError
from minicpm_edge.text.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer_edge_cases.json"
TOKENIZER_EDGE_CASES = {
    entry["name"]: entry["text"] * entry.get("repeat", 1) + entry.get("then", "")
    for entry in json.loads(GOLDEN.read_text(encoding="utf-8"))
}
CODE = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
TEXTS = [*CODE, *TOKENIZER_EDGE_CASES.values()]


@lru_cache(maxsize=1)
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 900)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return trained()


def test_ids_of_the_special_tokens(tokenizer):
    assert SPECIAL_TOKENS == ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    assert [tokenizer.vocab[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.im_end_id) == (1, 2, 4)
    assert tokenizer.stop_ids == {2, 4}
    assert tokenizer.adds_bos
    assert not tokenizer.adds_space


def test_the_vocabulary_has_every_byte_and_the_size_asked_for(tokenizer):
    assert tokenizer.vocab_size == 900
    assert {tokenizer.token_bytes(index) for index in range(5, 900)} >= {bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize("name", TOKENIZER_EDGE_CASES)
def test_every_edge_case_comes_back(tokenizer, name):
    text = TOKENIZER_EDGE_CASES[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert not set(ids) & {0, 1, 2, 3, 4}


@given(text=st.text())
def test_any_string_comes_back(text):
    assert trained().decode(trained().encode(text)) == text


def test_special_tokens_are_read_only_where_asked_for(tokenizer):
    text = "<s>a<|im_end|>"
    assert tokenizer.encode(text, special=True) == [1, *tokenizer.encode("a"), 4]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, 4]) == ""
    assert tokenizer.decode([1, 4], special=True) == "<s><|im_end|>"
    assert tokenizer.token_bytes(4) == b""
    assert tokenizer.token_bytes(4, special=True) == b"<|im_end|>"


def test_batches_and_single_texts_give_the_same_ids(tokenizer):
    texts = list(TOKENIZER_EDGE_CASES.values())
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode("a", bos=True) == [1, *tokenizer.encode("a")]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode_batch(["a\ud83db", "c"]) == [tokenizer.encode("a\ufffdb"), tokenizer.encode("c")]


def test_cut_off_characters_decode_to_the_replacement_character(tokenizer):
    ids = [tokenizer.vocab[spelling] for spelling in ("ð", "Ł")]  # the first two bytes of an emoji
    assert b"".join(map(tokenizer.token_bytes, ids)) == "😀".encode()[:2]
    assert tokenizer.decode(ids) == "\ufffd"


def test_leading_spaces_stay(tokenizer):
    assert tokenizer.decode(tokenizer.encode("  two")) == "  two"


def test_training_repeats_exactly():
    assert Tokenizer.train(TEXTS, 700).sha256 == Tokenizer.train(reversed(TEXTS), 700).sha256


def test_saving_and_loading_keeps_the_identity(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.chat_template == tokenizer.chat_template
    assert Tokenizer.load(tmp_path / "a" / "tokenizer.json").encode("xyz") == tokenizer.encode("xyz")


@pytest.mark.parametrize("size", [-1, 0, 5, MIN_VOCAB_SIZE, 1 << 40])
def test_a_vocabulary_size_out_of_range_is_refused(size):
    with pytest.raises(UserError, match=r"out of range.*choose 262 to 1048576"):
        Tokenizer.train(TEXTS, size)


def test_a_corpus_that_gives_too_few_tokens_is_refused():
    with pytest.raises(UserError, match=r"gives only (\d+) different tokens, 5000 were asked for.*of \1$"):
        Tokenizer.train(["the cat sat on the mat and the cat sat"] * 3, 5000)
    with pytest.raises(UserError, match="too short"):
        Tokenizer.train(["a"], 300)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tokenizer"),
        (b"{}", "not a tokenizer"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"model": {"type": "BPE"}', "not a tokenizer"),
    ],
)
def test_a_broken_file_is_named(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"neither tokenizer.json nor tokenizer.model"):
        Tokenizer.load(tmp_path)


def test_a_broken_configuration_is_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not readable as JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<nope>"}')
    with pytest.raises(UserError, match="no bos_token: '<nope>'"):
        Tokenizer.load(tmp_path)


def test_a_template_file_beside_the_configuration_counts(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("beside", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template == "beside"


def test_an_id_out_of_range_is_refused(tokenizer):
    for index in (-1, 900, 1 << 70):
        with pytest.raises(UserError, match="not in the vocabulary of 900"):
            tokenizer.token_bytes(index)


def test_transformers_agrees(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (1, 2, 0)
    for text in TOKENIZER_EDGE_CASES.values():
        assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text, special=True)
        assert other.decode(other.encode(text, add_special_tokens=False)) == text
    assert other("hi")["input_ids"] == tokenizer.encode("hi", bos=True)


SENTENCEPIECE_KINDS = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "user-defined": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<用户>", "<AI>"],
    },
    "defaults": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
}


@pytest.mark.parametrize("kind", SENTENCEPIECE_KINDS)
def test_sentencepiece_models_give_its_ids(kind, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in CODE for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=700,
        character_coverage=0.999,
        minloglevel=2,
        **SENTENCEPIECE_KINDS[kind],
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours.adds_space) == (1, 2, True, True)
    generator = random.Random(0)
    mixed = ["".join(generator.choices("abc <用户>AI你 \n", k=30)) for _ in range(200)]
    for text in [*lines[:400], *mixed, " a", "  a  b  ", "", "\n\nx\n", "你好 <用户>hi<AI>ok", "😀 é"]:
        assert ours.encode(text) == theirs.encode(text), repr(text)
        if (
            kind in ("llama", "user-defined") and "▁" not in text
        ):  # which SentencePiece cannot tell from a space
            assert ours.decode(ours.encode(text)) == text
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.encode("one two") == ours.encode("one two")
    assert again.sentencepiece == (tmp_path / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x0a\x7f", b"hello world", b"\x0a\x00"])
def test_a_broken_sentencepiece_model_is_named(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path)
