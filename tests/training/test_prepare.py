"""data prepare and tokenizer train: whole or not at all, the same on any number of cores, exact ids."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minicpm_training.data.encoder import Encoder, cut
from minicpm_training.data.prepare import prepare
from minicpm_training.data.tokenized_dataset import TokenizedDataset
from minicpm_training.data.writer import SetWriter

from minicpm_edge.cli import main as cli
from minicpm_edge.errors import UserError
from minicpm_edge.text.chat import encode_chat_with_mask
from minicpm_edge.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer_edge_cases.json"
TOKENIZER_EDGE_CASES = [
    entry["text"] * entry.get("repeat", 1) + entry.get("then", "")
    for entry in json.loads(GOLDEN.read_text(encoding="utf-8"))
]
CHAT = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine."}]
TOKENIZER = Tokenizer.train(
    [*TOKENIZER_EDGE_CASES, *map(str, range(3000)), "the quick brown fox jumps over the dog " * 3], 700
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    return folder


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def documents_of(tokens: TokenizedDataset) -> list[list[int]]:
    ids = tokens.read(0, tokens.num_tokens)
    return [part.tolist() for part in np.split(ids, tokens.document_starts[1:])]


def test_the_set_holds_exactly_the_tokenizers_ids(tmp_path, vocabulary):
    texts = [text for text in TOKENIZER_EDGE_CASES if text.strip()]
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TOKENIZER_EDGE_CASES])
    manifest = prepare([source], tokenizer=vocabulary, out=tmp_path / "set")
    tokens = TokenizedDataset.open(tmp_path / "set")
    assert documents_of(tokens) == [[1, *TOKENIZER.encode(text), 2] for text in texts]
    assert not manifest["has_mask"]
    assert manifest["num_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["num_tokens"] == tokens.num_tokens
    assert manifest["num_documents"] == len(texts)
    assert manifest["tokenizer_sha256"] == TOKENIZER.sha256
    assert manifest["sources"][0]["skipped"] == {"empty": len(TOKENIZER_EDGE_CASES) - len(texts)}


def test_chats_have_a_mask_and_texts_beside_them_count_whole(tmp_path, vocabulary):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "before"}, {"messages": CHAT}, {"text": "after"}])
    assert prepare([source], tokenizer=vocabulary, out=tmp_path / "set")["has_mask"]
    tokens = TokenizedDataset.open(tmp_path / "set")
    ids, mask = encode_chat_with_mask(TOKENIZER, CHAT)
    first, chat, last = documents_of(tokens)
    assert chat == [*ids, 2]
    assert tokens.read_mask(0, tokens.num_tokens).tolist() == [
        *[True] * len(first),
        *mask,
        False,
        *[True] * len(last),
    ]


def test_the_number_of_workers_changes_nothing(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr("minicpm_training.data.sources.CHUNK_BYTES", 50_000)  # some twenty chunks
    rows = [
        {"text": f"row {number} " + TOKENIZER_EDGE_CASES[number % len(TOKENIZER_EDGE_CASES)][:3000]}
        for number in range(3000)
    ]
    rows[700] = {"messages": CHAT}
    rows[800] = {"nothing": 1}
    source = write_lines(tmp_path / "a.jsonl", rows)
    manifests = [
        prepare([source], tokenizer=vocabulary, out=tmp_path / f"set{workers}", workers=workers)
        for workers in (1, 3)
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0]["sources"][0]["skipped"] == {"no field 'text'": 1}
    assert manifests[0]["num_documents"] == 2999
    for file in (tmp_path / "set1").iterdir():
        assert file.read_bytes() == (tmp_path / "set3" / file.name).read_bytes()


def test_the_report_names_what_was_skipped(tmp_path, vocabulary, capsys):
    good = write_lines(tmp_path / "good.jsonl", [{"text": "x"}, {"text": ""}])
    (tmp_path / "bad.jsonl").write_text("{\n" * 30, encoding="utf-8")
    arguments = ["--tokenizer", str(vocabulary), "--out", str(tmp_path / "set"), "--json"]
    assert cli.main(["data", "prepare", good, str(tmp_path / "bad.jsonl"), *arguments]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((tmp_path / "set" / "manifest.json").read_text(encoding="utf-8"))
    first, second = manifest["sources"]
    assert first["skipped"] == {"empty": 1}
    assert first["examples"] == [f"{good}:2: empty"]
    assert second["skipped"] == {"not valid JSON": 30}
    assert len(second["examples"]) == 10
    assert cli.main(["data", "prepare", good, str(tmp_path / "bad.jsonl"), *arguments[:-1]]) == 0
    printed = capsys.readouterr().out
    assert "30 × not valid JSON; the first:" in printed
    assert "warning: nothing was taken from" in printed


def test_a_corpus_with_nothing_in_it_is_an_error_and_leaves_nothing(tmp_path, vocabulary):
    source = write_lines(tmp_path / "a.jsonl", [{"text": " "}, {"body": "x"}])
    with pytest.raises(
        UserError, match=r"no document in .*a\.jsonl: 2 skipped, the first: .*a\.jsonl:1: empty"
    ):
        prepare([source], tokenizer=vocabulary, out=tmp_path / "set")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="the files are empty"):
        prepare([str(tmp_path / "empty.jsonl")], tokenizer=vocabulary, out=tmp_path / "set")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "empty.jsonl"]


def test_only_a_set_of_ours_is_replaced(tmp_path, vocabulary):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    prepare([source], tokenizer=vocabulary, out=tmp_path / "set")
    write_lines(tmp_path / "a.jsonl", [{"text": "two"}])
    prepare([source], tokenizer=vocabulary, out=tmp_path / "set")
    assert documents_of(TokenizedDataset.open(tmp_path / "set")) == [[1, *TOKENIZER.encode("two"), 2]]
    for out, message in ((tmp_path, "holds other files"), (tmp_path / "a.jsonl", "is a file")):
        with pytest.raises(UserError, match=message):
            prepare([source], tokenizer=vocabulary, out=out)


def test_shards_end_between_documents(tmp_path):
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 60_000, size) for size in (5, 40, 3, 1, 99, 20)]
    masks = [None, None, None, generator.random(1) < 0.5, None, generator.random(20) < 0.5]
    (tmp_path / "set").mkdir()
    with SetWriter(tmp_path / "set", np.dtype("<u2"), shard_tokens=50) as writer:
        for part, mask in zip(parts, masks, strict=True):
            writer.add(part, np.array([len(part)]), mask)
    assert [shard["num_tokens"] for shard in writer.shards] == [49, 99, 20]
    manifest = {"format": 1, "dtype": "uint16", "has_mask": True, "num_bytes": 1, "tokenizer_sha256": "x"}
    (tmp_path / "set" / "manifest.json").write_text(json.dumps({**manifest, "shards": writer.shards}))
    tokens = TokenizedDataset.open(tmp_path / "set")
    assert documents_of(tokens) == [part.tolist() for part in parts]
    expected = [
        np.ones(len(part), bool) if mask is None else mask for part, mask in zip(parts, masks, strict=True)
    ]
    assert tokens.read_mask(0, 168).tolist() == np.concatenate(expected).tolist()


ENCODER = Encoder(TOKENIZER)


def test_the_encoder_looks_words_up():
    assert ENCODER._splits_words


@pytest.mark.parametrize("index", range(len(TOKENIZER_EDGE_CASES)))
def test_the_encoder_gives_the_tokenizers_ids(index):
    assert ENCODER.encode(TOKENIZER_EDGE_CASES[index]).tolist() == TOKENIZER.encode(
        TOKENIZER_EDGE_CASES[index]
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text(st.sampled_from([*"aB1 '\n\t\r.!-s\u00a0\u0301é你，。ſ", "\U0001f600", "\U00020000"])),
    size=st.integers(1, 8),
)
def test_any_text_cut_and_looked_up_gives_the_tokenizers_ids(text, size):
    expected = TOKENIZER.encode(text)
    assert ENCODER.encode(text).tolist() == expected
    parts = list(cut(text, size))
    assert "".join(parts) == text
    assert [index for part in parts for index in TOKENIZER.encode(part)] == expected


def test_long_texts_are_cut_and_the_memory_for_words_is_bounded(monkeypatch):
    monkeypatch.setattr("minicpm_training.data.encoder.PIECE_CHARACTERS", 500)
    monkeypatch.setattr("minicpm_training.data.encoder.MAX_KNOWN_CHARACTERS", 2000)
    encoder = Encoder(TOKENIZER)
    text = " ".join(
        f"word{number} 😀" if number % 50 == 0 else f"word{number * 7919}" for number in range(2000)
    )
    assert encoder.encode(text).tolist() == TOKENIZER.encode(text)
    assert sum(map(len, encoder._known)) <= 2500


def test_other_tokenizers_go_through_their_own_encoding():
    definition = TOKENIZER.definition
    definition["normalizer"] = {"type": "NFC"}
    other = Tokenizer(json.dumps(definition), {})
    assert Encoder(other).encode("e\u0301").tolist() == other.encode("é")


KILLED = """
import sys
from minicpm_edge.cli.main import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("old", [False, True])
def test_a_kill_leaves_the_old_set_or_none(tmp_path, vocabulary, old):
    out = tmp_path / "sets" / "set"
    small = write_lines(tmp_path / "small.jsonl", [{"text": "old"}])
    if old:
        prepare([small], tokenizer=vocabulary, out=out)
    rows = [{"text": f"{number} {number * 7919 % 10007} " * 200} for number in range(6000)]
    source = write_lines(tmp_path / "large.jsonl", rows)
    script = tmp_path / "main.py"
    script.write_text(KILLED, encoding="utf-8")
    command = [sys.executable, str(script), "data", "prepare", source, "--tokenizer", str(vocabulary)]
    process = subprocess.Popen([*command, "--out", str(out), "--workers", "2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("sets/.set.tmp-*/tokens-00000.bin")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0
    names = names_in(out.parent)
    assert [name for name in names if not name.startswith(".set.tmp-")] == (["set"] if old else [])
    if old:
        assert documents_of(TokenizedDataset.open(out)) == [[1, *TOKENIZER.encode("old"), 2]]
    prepare([small], tokenizer=vocabulary, out=out)  # starts clean and clears up
    assert names_in(out.parent) == ["set"]


def test_the_tokenizer_command(tmp_path, capsys):
    source = write_lines(
        tmp_path / "a.jsonl", [{"text": f"word{n} and word{n}"} for n in range(500)] + [{"a": 1}]
    )
    command = ["tokenizer", "train", source, "--vocab-size", "400", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "t")]) == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert result["vocab_size"] == tokenizer.vocab_size == 400
    assert result["sha256"] == tokenizer.sha256
    assert result["sample_documents"] == 500
    assert cli.main([*command, "--out", str(tmp_path / "t")]) == 0  # its own is replaced
    assert cli.main([*command, "--out", str(tmp_path)]) == 1
    assert "holds other files" in capsys.readouterr().err


def test_the_sample_is_bounded_and_comes_from_everywhere(tmp_path, capsys):
    head = [{"text": "aaa bbb " * 500} for _ in range(500)]
    tail = [{"text": "zzz yyy " * 500} for _ in range(500)]
    source = write_lines(tmp_path / "a.jsonl", [*head, *tail])
    other = write_lines(tmp_path / "b.jsonl", [{"text": "kkk jjj " * 40}])
    command = ["tokenizer", "train", source, other, "--vocab-size", "270", "--sample-bytes", "2_400_000"]
    assert cli.main([*command, "--out", str(tmp_path / "t"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 1_000_000 < result["sample_bytes"] < 2_400_000
    vocab = Tokenizer.load(tmp_path / "t").vocab
    assert {"aaa", "zzz", "kkk"} & set(vocab) or {"aa", "zz"} <= set(vocab)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tokenizer", "train", "none.txt", "--out", "t"], 1, "none.txt does not exist"),
        (
            ["tokenizer", "train", "a.txt", "--vocab-size", "10", "--out", "t"],
            1,
            "vocabulary size 10 is out of range",
        ),
        (
            ["tokenizer", "train", "a.txt", "--vocab-size", "99999", "--out", "t"],
            1,
            "ask for a vocabulary of",
        ),
        (["tokenizer", "train", "a.txt", "--vocab-size", "1e9", "--out", "t"], 2, "not a whole number"),
        (["tokenizer", "train", "a.txt", "--vocab-size", "-5", "--out", "t"], 2, "out of range"),
        (["data", "prepare", "a.txt", "--tokenizer", "none", "--out", "t"], 1, "no tokenizer at none"),
        (
            ["data", "prepare", "a.txt", "--tokenizer", "t", "--out", "t", "--workers", "0"],
            2,
            "out of range: 1 or more",
        ),
        (["data", "prepare", "--tokenizer", "t", "--out", "t"], 2, "SRC"),
    ],
)
def test_wrong_commands_say_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the cat and the cat and the cat", encoding="utf-8")
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert names_in(tmp_path) == ["a.txt"]
