"""Whole or not at all."""

import pytest

from minicpm_edge.atomic import atomic_file, atomic_folder, recover, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_replaces_the_old(tmp_path):
    target = tmp_path / "set"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "nested").mkdir()
            (folder / "nested" / "file").write_text(content, encoding="utf-8")
            assert content == "one" or (target / "nested" / "file").read_text(encoding="utf-8") == "one"
    assert (target / "nested" / "file").read_text(encoding="utf-8") == "two"
    assert names(tmp_path) == ["set"]


def test_an_exception_leaves_the_old_and_no_litter(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert target.read_text(encoding="utf-8") == "old"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "set"):
        raise RuntimeError
    assert names(tmp_path) == ["file.txt"]


def test_what_a_killed_writer_left_is_undone(tmp_path):
    (tmp_path / ".set.tmp-00000000").mkdir()
    (tmp_path / ".file.txt.tmp-00000000").write_text("half", encoding="utf-8")
    (tmp_path / ".set.old-00000000").mkdir()
    (tmp_path / ".set.old-00000000" / "content").write_text("kept", encoding="utf-8")
    recover(tmp_path / "set")
    recover(tmp_path / "file.txt")
    assert (tmp_path / "set" / "content").read_text(encoding="utf-8") == "kept"
    assert names(tmp_path) == ["set"]
