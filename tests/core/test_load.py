"""``load``: which engine it picks, and what it says where it cannot."""

from __future__ import annotations

import importlib.util
import os

import pytest

from minicpm_edge import load
from minicpm_edge.cores import container_cpus
from minicpm_edge.errors import UserError
from minicpm_edge.load import default_threads


@pytest.fixture
def without(monkeypatch):
    """Make packages look as if they were not installed."""

    def hide(*names: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))

    return hide


def test_a_gguf_needs_no_torch(tiny_gguf, without):
    pytest.importorskip("llama_cpp")
    without("torch", "onnxruntime")
    with load(str(tiny_gguf), threads=1) as model:
        assert (model.backend, model.name, model.context_length) == ("llama_cpp", "tiny", 512)


@pytest.mark.parametrize(
    ("fixture", "package", "extra"),
    [
        ("tiny_gguf", "llama_cpp", "serve"),
        ("tiny_folder", "torch", "train"),
        ("tiny_onnx", "onnxruntime", "serve"),
    ],
)
def test_a_missing_runtime_names_what_to_install(fixture, package, extra, request, without):
    path = request.getfixturevalue(fixture)
    without(package)
    with pytest.raises(
        UserError, match=rf"{package}, which is not installed: pip install 'minicpm-edge\[{extra}\]'"
    ):
        load(path)


@pytest.mark.parametrize("name", ["context_length", "threads"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True, 10**30])
def test_bad_settings(tiny_gguf, name, value):
    with pytest.raises(UserError, match=f"^{name} must be a whole number"):
        load(tiny_gguf, **{name: value})


def test_a_run_loads_its_checkpoint(tiny_folder, tmp_path):
    run = tmp_path / "runs" / "alpha"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").touch()
    _copy(tiny_folder, run / "checkpoints" / "step-00000010")
    with load(root=tmp_path / "runs", threads=1) as model:
        assert (model.backend, model.name) == ("torch", "alpha")
        assert model.chat_template is not None


def test_damaged_folders_say_what_is_wrong(tiny_folder, tmp_path):
    folder = _copy(tiny_folder, tmp_path / "copy")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="safetensors"):
        load(folder, threads=1)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load(folder, threads=1)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load(folder, threads=1)


def test_a_damaged_gguf_never_reaches_llama_cpp(tiny_gguf, tmp_path):
    pytest.importorskip("llama_cpp")
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut short.*download or export it again"):
        load(path)


def test_default_threads_are_some_of_the_cpus():
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("200000 100000\n", 2), ("50000 100000\n", 1), ("250000 100000", 2), ("max 100000\n", None), ("", None)],
)
def test_a_container_may_have_fewer(tmp_path, text, cpus):
    (tmp_path / "cpu.max").write_text(text)
    assert container_cpus(tmp_path / "cpu.max") == cpus
    assert container_cpus(tmp_path / "missing") is None


def _copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
