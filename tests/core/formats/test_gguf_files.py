"""The names of a GGUF model's files."""

from pathlib import Path

from minicpm_edge.formats.gguf_files import model_files, part_number


def test_one_file():
    for name in ("model.gguf", "model-1-of-2.gguf", "model-00001-of-00002.bin", "-00001-of-00002.gguf"):
        assert part_number(Path("a") / name) == (1, 1)
        assert model_files(Path("a") / name) == [Path("a") / name]


def test_numbered_parts():
    assert part_number(Path("a/big-00002-of-00003.gguf")) == (2, 3)
    names = [file.as_posix() for file in model_files(Path("a/big-00001-of-00003.gguf"))]
    assert names == [f"a/big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
