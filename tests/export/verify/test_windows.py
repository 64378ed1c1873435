"""The held-out text: what the user names, the run's validation set, or the text in the package."""

import dataclasses
import json

import numpy as np
import pytest
from minicpm_export.gguf.format import GGUF
from minicpm_export.pipeline import export
from minicpm_export.source import Source
from minicpm_export.verify.windows import held_out

from minicpm_edge.errors import UserError
from minicpm_edge.text.tokenizer import Tokenizer


def test_own_text_and_its_faults(make_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks said so. " * 40, encoding="utf-8")
    source = Source(folder=make_model(), name="m", text=text)
    [made] = export(GGUF(quant="F32"), source, tmp_path / "m.gguf")
    assert made.held_out == str(text)
    lines = tmp_path / "text.jsonl"
    lines.write_text(
        f'{json.dumps({"text": text.read_text(encoding="utf-8")})}\n[1]\n{{"text": "cut o', "utf-8"
    )
    [again] = export(GGUF(quant="F32"), dataclasses.replace(source, text=lines), tmp_path / "m.gguf")
    assert again.checks[0].measures == made.checks[0].measures
    for content, message in ((b"short", "only .* tokens"), (b"\0\1" * 500, "not a text file")):
        text.write_bytes(content)
        with pytest.raises(UserError, match=message):
            export(GGUF(quant="F32"), source, tmp_path / "m.gguf")
    text.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        export(GGUF(quant="F32"), source, tmp_path / "m.gguf")


def test_the_validation_set_of_a_run_is_used(make_model, small_config, tmp_path):
    tokenizer = Tokenizer.load(make_model())
    (tmp_path / "held").mkdir()
    tokens = np.tile(np.array([1, 40, 41, 42, 2], dtype="<u2"), 60)
    tokens.tofile(tmp_path / "held" / "tokens-00000.bin")
    (tmp_path / "held" / "manifest.json").write_text('{"dtype": "uint16"}', encoding="utf-8")
    recipe = f'[data]\n[[data.valid]]\npath = "{(tmp_path / "held").as_posix()}"\n'
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    text = held_out(tokenizer, small_config, run=tmp_path)
    assert text.name == "validation set held"
    assert text.windows[0].ids[:6] == [1, 1, 40, 41, 42, 2]
    # The token after the end of a document is nobody's to predict.
    assert text.windows[0].targets[:7] == [1, 40, 41, 42, 2, -1, 40]
    assert held_out(tokenizer, small_config, run=tmp_path / "held").name == "built-in text"
