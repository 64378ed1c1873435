"""What a MODEL argument may be, and what is said where it is none."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from minicpm_edge.errors import UserError
from minicpm_edge.formats import resolve
from minicpm_edge.formats.checkpoint import HFStateDict
from minicpm_edge.formats.gguf_header import check_gguf
from minicpm_edge.formats.resolve import ModelRef, onnx_file, resolve_model
from minicpm_edge.formats.run_folder import find_runs
from minicpm_edge.json_file import read_json
from minicpm_edge.text.tokenizer import Tokenizer


def touch(path: Path, text: str = "", *, age: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def checkpoint(branch: Path, step: int, *, finished: bool = False, age: float = 0) -> Path:
    folder = branch / "checkpoints" / f"step-{step:08d}"
    touch(folder / "config.json", "{}")
    touch(folder / "model.safetensors")
    touch(folder / "state.json", json.dumps({"step": step, "finished": finished}), age=age)
    return folder


def make_run(path: Path, *, age: float = 0) -> Path:
    touch(path / "recipe.toml", age=age)
    return path


def test_a_trunk_stands_for_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "alpha")
    checkpoint(run, 90)
    newest = checkpoint(run, 100_000_000)  # nine digits: more than 99,999,999 of eight
    (run / "checkpoints" / ".step-00000200.tmp-1").mkdir()
    touch(run / "checkpoints" / "step-00000300")  # a file is none
    assert resolve_model(run) == ModelRef(kind="hf", path=newest, run=run)
    assert resolve_model(run).name == "alpha"


def test_a_finished_decay_stands_before_the_trunk(tmp_path):
    run = make_run(tmp_path / "alpha")
    checkpoint(run, 500, finished=True)
    for label, finished, age in (("old", True, 50), ("new", True, 10), ("unfinished", False, 0)):
        make_run(run / "decays" / label)
        checkpoint(run / "decays" / label, 100)
        last = checkpoint(run / "decays" / label, 200, finished=finished, age=age)
        if label == "new":
            newest = last
    assert resolve_model(run).path == newest
    assert resolve_model(run).run == run
    assert resolve_model(run / "decays" / "old").path.parent.parent.name == "old"


def test_a_damaged_state_is_not_finished(tmp_path):
    run = make_run(tmp_path / "alpha")
    trunk = checkpoint(run, 1)
    for number, text in enumerate(["", "[]", "{", '{"finished": "yes"}', "[" * 100_000]):
        decayed = checkpoint(run / "decays" / str(number), 2)
        touch(decayed / "state.json", text)
    assert resolve_model(run).path == trunk


def test_nothing_named_is_the_run_written_to_last(tmp_path):
    for name, age in (("old", 20), ("newest", 10), ("older", 30)):
        checkpoint(make_run(tmp_path / name, age=age), 1)
    make_run(tmp_path / "just-begun", age=0)  # no checkpoint yet
    assert [run.name for run in find_runs(tmp_path)] == ["just-begun", "newest", "old", "older"]
    assert resolve_model(None, root=tmp_path).name == "newest"
    touch(tmp_path / "older" / "decays" / "d" / "metrics.jsonl", age=-5)
    assert resolve_model(None, root=tmp_path).name == "older"


def test_a_run_by_name(tmp_path):
    checkpoint(make_run(tmp_path / "alpha"), 1)
    assert resolve_model("alpha", root=tmp_path).run == tmp_path / "alpha"


def test_without_runs_the_demo_model_or_advice(tmp_path, monkeypatch):
    demo = touch(tmp_path / "demo.gguf")
    monkeypatch.setattr(resolve, "demo_model", lambda: demo)
    assert resolve_model(None, root=tmp_path / "runs", demo=True) == ModelRef(kind="gguf", path=demo)
    with pytest.raises(UserError, match="quickstart"):
        resolve_model(None, root=tmp_path / "runs")
    monkeypatch.setattr(resolve, "demo_model", lambda: None)
    with pytest.raises(UserError, match=r"quickstart.*minicpm-edge\[demo\]"):
        resolve_model(None, root=tmp_path / "runs", demo=True)


def test_files_and_folders(tmp_path):
    gguf = touch(tmp_path / "m" / "Model.Q4.gguf")
    assert resolve_model(gguf) == ModelRef(kind="gguf", path=gguf) == resolve_model(str(gguf))
    assert resolve_model(gguf).name == "Model.Q4"
    assert resolve_model(gguf.parent) == ModelRef(kind="gguf", path=gguf)
    folder = touch(tmp_path / "hf" / "config.json").parent
    weights = touch(folder / "model.safetensors")
    assert resolve_model(folder) == resolve_model(weights) == ModelRef(kind="hf", path=folder)
    sharded = touch(tmp_path / "sharded" / "config.json").parent
    touch(sharded / "model.safetensors.index.json")
    assert resolve_model(sharded).kind == "hf"


@pytest.mark.parametrize("name", ["model.onnx", "onnx/model.onnx", "onnx/model_quantized.onnx"])
def test_onnx_folders(tmp_path, name):
    file = touch(tmp_path / "web" / name)
    assert resolve_model(tmp_path / "web").kind == "onnx"
    for given in (tmp_path / "web", file):
        ref = resolve_model(given)
        assert onnx_file(ref.path) == (file, tmp_path / "web")
        assert ref.name == "web"


def test_a_model_in_parts_is_one(tmp_path):
    for part in (1, 2, 3):
        touch(tmp_path / f"big-{part:05d}-of-00003.gguf")
    assert resolve_model(tmp_path).path.name == "big-00001-of-00003.gguf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "neither a run, a checkpoint"),
        (["a.gguf", "b.gguf", "c.gguf"], "holds 3 GGUF files; name one of them: a.gguf, b.gguf, c.gguf"),
        ([f"{letter}.gguf" for letter in "abcdefg"], "e.gguf, …"),
        (["model.safetensors"], "no config.json"),
        (["config.json", "pytorch_model.bin"], "pickled"),
        (["config.json", "tokenizer.json"], "is not a model"),
        (["recipe.toml"], "no checkpoint yet"),
        (["alpha/recipe.toml"], "folder of runs"),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, message):
    for name in files:
        touch(tmp_path / name)
    with pytest.raises(UserError) as caught:
        resolve_model(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_names_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match=r"no model at .*missing.*nor a run"):
        resolve_model(tmp_path / "missing")
    with pytest.raises(UserError, match="is not a model"):
        resolve_model(touch(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match="empty string"):
        resolve_model("")
    for name in ("a" * 5000, "a\0b", "\ud800"):
        with pytest.raises(UserError, match="model") as caught:
            resolve_model(name)
        assert len(str(caught.value)) < 500


PARTS = {
    "shards": (["model-00001-of-00002.safetensors"], r"has shards \(model-00001-of-00002.*index.json; copy"),
    "adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        r"adapter.*merge it into its base model a/b and",
    ),
    "adapter weights": (["adapter_model.safetensors"], r"adapter.*merge it into its base model and give"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model_are_told_apart(name, tmp_path):
    files, message = PARTS[name]
    touch(tmp_path / "config.json", "{}")
    for file in files:
        touch(tmp_path / file, '{"base_model_name_or_path": "a/b"}')
    with pytest.raises(UserError, match=message):
        resolve_model(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_snapshot_of_the_hub_cache_goes_by_the_models_name(tmp_path):
    """Not by the commit's hash that its folder is called, nor by that of the blob which a file in it links to."""
    cache = tmp_path / "models--openbmb--MiniCPM--2B"
    snapshot = cache / "snapshots" / ("1f" * 20)
    blob = touch(cache / "blobs" / ("ab" * 32))
    for name in ("config.json", "model.safetensors"):
        touch(snapshot / name, "{}")
    (snapshot / "MiniCPM-2B-Q8_0.gguf").symlink_to(blob)
    assert resolve_model(snapshot).name == "MiniCPM--2B"
    assert resolve_model(snapshot / "MiniCPM-2B-Q8_0.gguf").name == "MiniCPM-2B-Q8_0"


def test_a_model_goes_by_its_folders_name(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        touch(tmp_path / "my--model" / name, "{}")
    monkeypatch.chdir(tmp_path / "my--model")
    assert resolve_model(".").name == "my--model"


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 4852054\n"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", lambda folder: HFStateDict(folder)),
        ("m.gguf", lambda folder: check_gguf(folder / "m.gguf")),
        ("tokenizer.json", lambda folder: Tokenizer.load(folder)),
        ("tokenizer.model", lambda folder: Tokenizer.load(folder)),
        ("config.json", lambda folder: read_json(folder / "config.json")),
    ],
)
def test_a_git_lfs_pointer_is_told(name, read, tmp_path):
    touch(tmp_path / name, POINTER)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        read(tmp_path)
