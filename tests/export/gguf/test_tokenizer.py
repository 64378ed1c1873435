"""llama.cpp's tokenizer, read from our GGUF, gives our ids on every tokenizer edge case."""

import json
import pydoc_data.topics
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from minicpm_export.gguf import writer
from minicpm_export.gguf.format import GGUF
from minicpm_export.gguf.runtime import LlamaRuntime
from minicpm_export.gguf.tokenizer import tokenizer_keys
from minicpm_export.gguf.writer import write_gguf
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minicpm_edge.errors import UserError
from minicpm_edge.formats.generation import read_generation
from minicpm_edge.text.tokenizer import SPLIT_PATTERN, Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer_edge_cases.json"
TOKENIZER_EDGE_CASES = {
    entry["name"]: entry["text"] * entry.get("repeat", 1) + entry.get("then", "")
    for entry in json.loads(GOLDEN.read_text(encoding="utf-8"))
}


def open_runtime(folder, path):
    write_gguf(folder, path, quant="F32", name="test", report=lambda status: None)
    return LlamaRuntime(path, context_length=32)


def differences(runtime, tokenizer):
    """The edge cases that the two split differently."""
    texts = TOKENIZER_EDGE_CASES.items()
    return [name for name, text in texts if runtime.tokenize(text) != tokenizer.encode(text)]


def test_our_tokenizer(make_model, tmp_path):
    folder = make_model()
    with open_runtime(folder, tmp_path / "m.gguf") as runtime:
        assert differences(runtime, Tokenizer.load(folder)) == []


def test_a_larger_vocabulary(make_model, small_config, tmp_path):
    tokenizer = Tokenizer.train([*pydoc_data.topics.topics.values(), *TOKENIZER_EDGE_CASES.values()], 3000)
    with foreign(tokenizer, small_config, make_model, tmp_path, vocab_size=3001) as runtime:
        assert differences(runtime, tokenizer) == []


def test_special_tokens_are_read_where_they_are_asked_for(make_model, tmp_path):
    folder = make_model()
    tokenizer = Tokenizer.load(folder)
    with open_runtime(folder, tmp_path / "m.gguf") as runtime:
        for text in ("<s>a</s>", "<|im_start|>user\nhi<|im_end|>\n", " <|im_end|> <pad>"):
            assert runtime.tokenize(text, special=True) == tokenizer.encode(text, special=True)
            assert runtime.tokenize(text) == tokenizer.encode(text) != tokenizer.encode(text, special=True)


def foreign(tokenizer, config, make_model, tmp_path, vocab_size=1024):
    """A GGUF with another tokenizer than the model's own."""
    tokenizer.save(tmp_path / "tokenizer")
    folder = make_model(vocab_size=vocab_size)
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        source = tmp_path / "tokenizer" / file.name if file.name.startswith("tokenizer") else file
        (copy / file.name).write_bytes(source.read_bytes())
    return open_runtime(copy, tmp_path / "m.gguf")


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama-bpe": (SPLIT_PATTERN, True),
    "llama-bpe as published": (LLAMA3, True),
    "smaug-bpe": (SPLIT_PATTERN, False),
    "qwen2": (LLAMA3.replace("{1,3}", ""), False),
    "smollm": ("digits", False),
    "gpt-2": (None, False),
}


@pytest.mark.parametrize("name", SPLITS)
def test_other_byte_level_tokenizers(name, make_model, small_config, tmp_path):
    pattern, ignore_merges = SPLITS[name]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))]
    if pattern == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pattern:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    tokenizer = Tokenizer(backend.to_str(), {"bos_token": "<s>", "eos_token": "</s>"})
    with foreign(tokenizer, small_config, make_model, tmp_path) as runtime:
        assert differences(runtime, tokenizer) == []


def test_a_sentencepiece_tokenizer(make_model, small_config, tmp_path):
    """Byte-fallback BPE with a space put in front, as MiniCPM's and Llama 2's tokenizers are."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<unk>", "<s>", "</s>", *alphabet],
        show_progress=False,
        max_token_length=16,
    )
    texts = [word for text in pydoc_data.topics.topics.values() for word in text.split(" ")]
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    definition = json.loads(backend.to_str())
    kept = {"<unk>", "<s>", "</s>"}  # byte tokens are ordinary entries of the vocabulary
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in kept]
    tokenizer = Tokenizer(json.dumps(definition), {"bos_token": "<s>", "eos_token": "</s>"})
    assert not tokenizer.is_byte_level and tokenizer.adds_bos
    with foreign(tokenizer, small_config, make_model, tmp_path) as runtime:
        assert differences(runtime, tokenizer) == []


MARKERS = ["<|im_start|>", "<AI>", "<用户>"]


@pytest.fixture(scope="module")
def user_defined(tmp_path_factory):
    """A folder with a ``tokenizer.model`` of 600 pieces in which these markers are user-defined, and no settings."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [line for text in pydoc_data.topics.topics.values() for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=MARKERS,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


DECODER = {
    str(index): {"content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    for index, text in enumerate(["<unk>", "<s>", "</s>", *MARKERS[:2]])
}
# tokenizer_config.json, and the kinds of the three markers that must come out of it
SETTINGS = {
    "the pieces alone": ({}, [3, 4, 4]),
    "added_tokens_decoder": ({"added_tokens_decoder": DECODER}, [3, 3, 4]),
    "additional_special_tokens": ({"additional_special_tokens": MARKERS}, [3, 3, 3]),
    "eos_token": ({"eos_token": {"content": "<AI>"}}, [3, 3, 4]),
}


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True], ids=["tokenizer.model", "with tokenizer.json"])
@pytest.mark.parametrize("case", SETTINGS)
def test_user_defined_pieces_keep_their_kind(case, as_json, user_defined, make_model, small_config, tmp_path):
    """As published MiniCPM tokenizers have them: the export passes its verification, and llama.cpp finds them."""
    settings, kinds = SETTINGS[case]
    folder = tmp_path / "m"
    shutil.copytree(make_model(vocab_size=608), folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes((user_defined / "tokenizer.model").read_bytes())
    tokenizer = Tokenizer.load(folder)
    if as_json:
        tokenizer.save(folder)
        assert Tokenizer.load(folder).definition == tokenizer.definition
    got = entries(Tokenizer.load(folder), replace(small_config, vocab_size=608))
    assert got["tokenizer.ggml.token_type"][:3] == [2, 3, 3]
    assert got["tokenizer.ggml.token_type"][3:6] == kinds
    assert set(got["tokenizer.ggml.token_type"][6:262]) == {6} and set(
        got["tokenizer.ggml.token_type"][600:]
    ) == {5}
    [made] = export(GGUF(quant="F32"), Source(folder=folder, name="m"), tmp_path / "m.gguf")
    assert made.passed
    assert bool(made.notes) == (4 in kinds)  # SentencePiece puts no space behind its own pieces
    with LlamaRuntime(tmp_path / "m.gguf", context_length=32) as runtime:
        assert differences(runtime, tokenizer) == []
        for marker, kind in zip(MARKERS, kinds, strict=True):
            assert (tokenizer.vocab[marker] in runtime.tokenize(f"a {marker} b")) == (kind == 4)
            assert tokenizer.vocab[marker] in runtime.tokenize(f"a {marker} b", special=True)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [True, False])
def test_a_folder_that_transformers_saved(legacy, user_defined, make_model, tmp_path):
    """Its tokenizer.json has a Metaspace, whose spaces GGUF cannot all express: two notes say which, and it passes."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "tokenizer.model").write_bytes((user_defined / "tokenizer.model").read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy, **names}
    (tmp_path / "sp" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    folder = tmp_path / "m"
    shutil.copytree(make_model(vocab_size=608), folder)
    (folder / "tokenizer.json").unlink()
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path / "sp")
    theirs.save_pretrained(folder)
    ours = Tokenizer.load(folder)
    for text in ("<|im_start|>user hi<|im_end|> x", "hello <用户>you", "  a  b", ""):
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"]
    [made] = export(GGUF(quant="F32"), Source(folder=folder, name="m"), tmp_path / "m.gguf")
    assert any("begins with one too" in note for note in made.notes)
    assert any("follows an added token" in note for note in made.notes) == (not legacy)


@pytest.mark.slow
def test_a_marker_of_another_kind_is_caught(user_defined, make_model, tmp_path, monkeypatch):
    """Written as NORMAL, llama.cpp would spell the marker in letters: the chat would be another."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)

    def all_normal(*model):
        for key, kind, value in tokenizer_keys(*model):
            is_kinds = key.endswith("token_type")
            yield key, kind, [1 if entry == 3 else entry for entry in value] if is_kinds else value

    monkeypatch.setattr(writer, "tokenizer_keys", all_normal)
    with pytest.raises(UserError, match="as a special token"):
        export(GGUF(quant="F32"), Source(folder=folder, name="m"), tmp_path / "m.gguf")


def test_settings_that_contradict_the_tokenizer_are_refused(user_defined, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((user_defined / "tokenizer.model").read_bytes())
    decoder = {"9": {"content": "<AI>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(UserError, match=r"'<AI>' has the id 9 in its settings and 4"):
        Tokenizer.load(tmp_path)


def entries(tokenizer, config, folder=Path("nothing")):
    generation = read_generation(folder, tokenizer)
    return {key: value for key, _, value in tokenizer_keys(tokenizer, config, generation)}


def test_the_keys(tokenizer_folder, small_config):
    tokenizer = Tokenizer.load(tokenizer_folder)
    got = entries(tokenizer, small_config)
    assert (got["tokenizer.ggml.model"], got["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    ids = {name: got[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")}
    assert ids == {"bos": 1, "eos": 2, "eot": 4, "padding": 0}
    assert got["tokenizer.ggml.add_bos_token"] is True and got["tokenizer.ggml.add_eos_token"] is False
    tokens, kinds = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == small_config.vocab_size == 520
    assert tokens[:5] == ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    assert kinds[:5] == [3] * 5 and set(kinds[5:512]) == {1} and set(kinds[512:]) == {5}
    assert got["tokenizer.chat_template"] == tokenizer.chat_template


def test_tokenizers_that_llama_cpp_cannot_read_are_refused(tokenizer_folder, small_config):
    tokenizer = Tokenizer.load(tokenizer_folder)

    def changed(**parts):
        return Tokenizer(json.dumps({**tokenizer.definition, **parts}), {})

    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    sequence = {"type": "Sequence", "pretokenizers": [split, level]}
    with pytest.raises(UserError, match="no name for this tokenizer's way of splitting"):
        entries(changed(pre_tokenizer=sequence), small_config)
    with pytest.raises(UserError, match="normalises"):
        entries(changed(normalizer={"type": "NFC"}), small_config)
