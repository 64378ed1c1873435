"""JSON files that hold one object."""

import pytest

from minicpm_edge.errors import UserError
from minicpm_edge.json_file import read_json, write_json


def test_what_is_written_is_read(tmp_path):
    value = {"name": "模型", "nested": {"list": [1, 2.5, None, True]}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert "模型" in text and text.endswith("}\n") and "\r" not in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"3",
        b"null",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
def test_anything_but_an_object_is_one_line_that_names_the_file(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    for missing_ok in (False, True):
        with pytest.raises(UserError, match=r"a\.json: (not readable as JSON|expected a JSON object)"):
            read_json(file, missing_ok=missing_ok)


def test_a_missing_file_is_empty_only_where_it_may_be(tmp_path):
    assert read_json(tmp_path / "a.json", missing_ok=True) == {}
    with pytest.raises(UserError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="not readable"):
        read_json(tmp_path, missing_ok=True)
