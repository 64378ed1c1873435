"""Reading every kind of file; what cannot be read is named, never dropped in silence."""

import gzip
import json
import os
import sys
import types

import pyarrow as pa
import pytest
import zstandard
from minicpm_training.data import sources as sources_module
from minicpm_training.data.documents import Document, Skipped, documents
from minicpm_training.data.sources import find_sources, read_chunks
from pyarrow import parquet

from minicpm_edge.errors import UserError

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def read(*names, field="text"):
    """(texts, skipped as strings) of the sources."""
    found = [item for chunk in read_chunks(find_sources(names), field) for item in documents(chunk, field)]
    texts = [item.text for item in found if isinstance(item, Document)]
    return texts, [str(item) for item in found if isinstance(item, Skipped)]


def lines(*rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


ROWS = lines(*({"text": f"text {number} é"} for number in range(5)))
TEXTS = [f"text {number} é" for number in range(5)]


# The same bytes in every process that collects these tests: gzip writes the time, unless it is told one.
ROWS_GZ = gzip.compress(ROWS, mtime=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.jsonl", ROWS, id="plain"),
        pytest.param("a.jsonl.gz", ROWS_GZ, id="gzip"),
        pytest.param("a.jsonl.zst", zstandard.compress(ROWS), id="zstd"),
        pytest.param(
            "a.JSONL",
            b"\xef\xbb\xbf" + ROWS.replace(b"\n", b"\r\n\r\n").rstrip(),
            id="windows: byte order mark, empty lines, no newline at the end",
        ),
        pytest.param(
            "a.jsonl.zst", zstandard.compress(ROWS[:40]) + zstandard.compress(ROWS[40:]), id="two zstd frames"
        ),
        pytest.param(
            "a.jsonl.gz",
            gzip.compress(ROWS[:40], mtime=0) + gzip.compress(ROWS[40:], mtime=0),
            id="two gzip members",
        ),
    ],
)
def test_json_lines_plain_and_compressed(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(str(tmp_path / name)) == (TEXTS, [])


def test_text_files_are_one_document_each(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\ntwo\n".encode())
    (tmp_path / "b.md").write_text("# Three", encoding="utf-8")
    assert read(str(tmp_path)) == (["One\r\ntwo\n", "# Three"], [])


def test_a_very_long_text_file_is_cut_at_ends_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "MAX_TEXT_BYTES", 10)
    (tmp_path / "a.txt").write_text("first line\nsecond\nthird\n", encoding="utf-8")
    assert read(str(tmp_path / "a.txt")) == (["first line\n", "second\nthird\n"], [])


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": [1, 2, 3], "text": ["x", None, " "]}), file)
    texts, skipped = read(str(file))
    assert texts == ["x"]
    assert skipped == [f"{file}:2: no field 'text' (it has text)", f"{file}:3: empty"]
    texts, skipped = read(str(file), field="body")
    assert texts == []
    assert skipped == [f"{file}: no column 'body' among id, text"]
    parquet.write_table(pa.table({"messages": [CHAT, CHAT]}), file)
    assert read(str(file)) == (["QA", "QA"], [])


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "x", "text": "y"}))
    assert read(str(tmp_path / "a.jsonl"), field="body") == (["x"], [])


def test_chats_are_told_by_their_messages(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": CHAT}, {"text": "t", "messages": None}))
    chunk = next(read_chunks(find_sources([str(tmp_path / "a.jsonl")]), "text"))
    chat, text = documents(chunk, "text")
    assert chat == Document(text="QA", messages=CHAT)
    assert text == Document(text="t")


def test_every_bad_row_is_named_with_its_line_and_reason(tmp_path):
    file = tmp_path / "a.jsonl"
    bad = [
        b'{"text": "good"}',
        b'{"text": "cut off',
        b'{"text": "\xff"}',
        b"[1, 2]",
        b'{"body": "x"}',
        b'{"text": 7}',
        b'{"text": null}',
        b'{"text": " \\n"}',
        b'{"text": "\\ud83d"}',
        b'{"messages": "hello"}',
        b'{"messages": [{"role": "user", "content": "Q"}]}',
        b'{"messages": [{"role": "robot", "content": "Q"}]}',
        b'{"text": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"",
        b"NaN",
        b'{"text": "last"}',
    ]
    file.write_bytes(b"\n".join(bad))
    texts, skipped = read(str(file))
    assert texts == ["good", "last"]
    expected = {
        2: "not valid JSON",
        3: "not UTF-8 text",
        4: "not a JSON object",
        5: "no field 'text' (it has body)",
        6: "field 'text' is not text (int)",
        7: "no field 'text'",
        8: "empty",
        9: "half a surrogate pair",
        10: "not a conversation (messages must be a list",
        11: "a conversation without an answer",
        12: "not a conversation (message 1 has role 'robot'",
        13: "not valid JSON",
        14: "not valid JSON",
        16: "not a JSON object",
    }
    assert len(skipped) == len(expected)
    for entry, (line, reason) in zip(skipped, expected.items(), strict=True):
        assert entry.startswith(f"{file}:{line}: {reason}")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param("a.jsonl.gz", ROWS_GZ[:-8], "cannot be read: Truncated", id="short gzip"),
        pytest.param(
            "a.jsonl.zst", zstandard.compress(ROWS)[:-1], "cannot be read: Truncated", id="short zstd"
        ),
        pytest.param("a.jsonl.gz", b"not compressed", "cannot be read: zlib", id="not gzip"),
        pytest.param("a.jsonl.zst", b"not compressed", "cannot be read: ZSTD", id="not zstd"),
        pytest.param("a.parquet", b"PAR1 this is no table PAR1", "damaged", id="not parquet"),
        pytest.param("a.parquet", b"", "damaged", id="empty parquet"),
        pytest.param("a.txt", b"caf\xe9", "not UTF-8 text (byte 3)", id="latin-1"),
        pytest.param("a.txt", b"", "empty", id="empty text"),
        pytest.param("a.md", b" \n ", "empty", id="blank markdown"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_text("fine", encoding="utf-8")
    texts, skipped = read(str(tmp_path))
    assert texts[-1] == "fine"
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{tmp_path / name}: {reason}")


def test_what_came_before_the_damage_is_kept(tmp_path):
    content = lines(*({"text": f"{number} " + os.urandom(40).hex()} for number in range(20_000)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content)[:-100])
    texts, skipped = read(str(tmp_path))
    assert len(skipped) == 1
    assert 15_000 < len(texts) < 20_000


def test_a_line_past_the_limit_is_dropped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "MAX_LINE_BYTES", 2 << 20)
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        lines({"text": "a"}, {"text": "x" * (5 << 20)}, {"text": "b"}, {"text": "c" * (1 << 20)})
    )
    texts, skipped = read(str(file))
    assert [text[:1] for text in texts] == ["a", "b", "c"]
    assert skipped == [f"{file}:2: a line of more than 2 MB"]


def test_lines_across_blocks_stay_whole(tmp_path):
    texts = [str(number) * (number % 3000) + "." for number in range(3000)]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(*({"text": text} for text in texts))))
    assert read(str(tmp_path)) == (texts, [])
    shares = [chunk.done for chunk in read_chunks(find_sources([str(tmp_path)]), "text")]
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] == 1


def test_folders_and_globs_mixed_and_nothing_twice(tmp_path):
    for name in ("x/a.txt", "x/deep/b.md", "x/c.jsonl", "y/d.txt", "x/.hidden.txt", "x/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines({"text": name}) if name.endswith("jsonl") else name.encode())
    found = find_sources([str(tmp_path / "x"), str(tmp_path / "**" / "*.txt"), str(tmp_path / "y")])
    assert [[file.name for file in source.files] for source in found] == [
        ["a.txt", "c.jsonl", "b.md"],
        ["d.txt"],
    ]
    assert found[0].num_ignored == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "does not exist"),
        ("empty", "holds no .txt, .md, .jsonl"),
        ("*.none", "matches no .txt"),
        ("picture.png", "of no kind that can be read: .txt"),
    ],
)
def test_sources_that_name_nothing(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").touch()
    with pytest.raises(UserError, match=message):
        find_sources([name])


def test_a_dataset_by_name(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": f"row {number}", "id": number} for number in range(300)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    texts, skipped = read("datasets:owner/name:config")
    assert texts == [f"row {number}" for number in range(300)]
    assert skipped == []
    assert calls == [("owner/name", "config", "train", True)]


def test_a_dataset_without_the_package_or_the_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        read("datasets:name")

    def load_dataset(*arguments, **named):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match="datasets:name cannot be read: no network"):
        read("datasets:name")
