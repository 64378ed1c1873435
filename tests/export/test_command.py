"""The command line: what is replaced, what is left alone, and what a stopped export leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from minicpm_export import pipeline

from minicpm_edge import load
from minicpm_edge.cli.main import main
from minicpm_edge.errors import UserError

FORMS = {
    "gguf": (["--gguf", "--quant", "F16"], "m.gguf"),
    "hf": (["--hf"], "m-hf"),
    "onnx": (["--onnx", "--quant", "F32"], "m-onnx"),
}


@pytest.fixture
def model(make_model, tmp_path, monkeypatch):
    """The small model as ./m in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    for file in make_model().iterdir():
        os.link(file, tmp_path / "m" / file.name)
    return tmp_path / "m"


def content(path):
    """Every file under a path, with its bytes."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files}


@pytest.mark.parametrize("form", FORMS)
def test_an_export_of_ours_is_replaced_and_anything_else_is_not(form, model, tmp_path, capsys):
    options, name = FORMS[form]
    out = tmp_path / name
    command = ["export", "m", *options, "--out", str(out)]
    assert main(command) == 0
    assert main(command) == 0  # our own
    if form == "gguf":
        out.write_bytes(b"GGUF, but another program's")
    else:
        (out / "notes.txt").write_text("not ours", encoding="utf-8")
    before = content(out)
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert content(out) == before
    assert main([*command, "--force"]) == 0
    assert content(out) != before


@pytest.mark.parametrize("options", [["--hf"], ["--onnx"]])
def test_no_folder_without_a_model_is_ever_replaced(options, model, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear", encoding="utf-8")
    assert main(["export", "m", *options, "--out", str(tmp_path / "home"), "--force"]) == 1
    assert (tmp_path / "home" / "letter.txt").read_text(encoding="utf-8") == "dear"
    assert main(["export", "m", *options, "--out", str(tmp_path / "m")]) == 1  # the model itself
    assert (model / "model.safetensors").is_file()
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("form", FORMS)
def test_a_failure_leaves_the_old_export(form, failure, model, tmp_path, monkeypatch, capsys):
    options, name = FORMS[form]
    command = ["export", "m", *options, "--out", str(tmp_path / name)]
    assert main(command) == 0
    before = content(tmp_path)

    def fail(*arguments, **settings):
        raise failure

    monkeypatch.setattr(pipeline, "compare", fail)  # the last step: everything is written by then
    assert main(command) == (130 if isinstance(failure, KeyboardInterrupt) else 1)
    assert content(tmp_path) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_a_kill_leaves_the_old_export_and_the_next_one_cleans_up(form, model, tmp_path):
    options, name = ["--gguf", "--quant", "Q8_0"] if form == "gguf" else FORMS[form][0], FORMS[form][1]
    command = [sys.executable, "-m", "minicpm_edge", "export", "m", *options, "--out", name]
    assert main(command[3:]) == 0
    before = content(tmp_path)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f".{name}.tmp-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert process.returncode == -signal.SIGKILL and left
    assert {path: data for path, data in content(tmp_path).items() if ".tmp-" not in path} == before
    assert main(command[3:]) == 0
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM")
@pytest.mark.parametrize("moment", ["writing", "quantising", "comparing"])
def test_a_termination_leaves_nothing_behind(moment, model, tmp_path):
    """Within the writing, within llama.cpp's call, and within a comparison."""
    before = content(tmp_path)
    where = {
        "writing": "minicpm_export.gguf.format.write_gguf",
        "quantising": "subprocess.Popen.communicate",
        "comparing": "minicpm_export.pipeline.compare",
    }[moment]
    program = (
        "import sys, time, importlib\n"
        "import minicpm_export.gguf.format, minicpm_export.pipeline, subprocess\n"
        "def wait(*arguments, **settings):\n"
        "    print('now', flush=True)\n"
        "    time.sleep(60)\n"
        f"{where} = wait\n"
        "from minicpm_edge.cli.main import main\n"
        "sys.exit(main(['export', 'm', '--gguf', '--quant', 'Q8_0', '--out', 'm.gguf', '--json']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        if moment != "writing":
            assert [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert content(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_json_output_and_default_names(model, tmp_path, capsys):
    assert main(["export", "m", "--gguf", "--quant", "q8_0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["path"] == "m-Q8_0.gguf" and (tmp_path / "m-Q8_0.gguf").is_file()
    assert answer["certificates"][0]["verdict"] == "pass"
    assert main(["export", "m", "--gguf"]) == 0
    shown = capsys.readouterr().out
    assert "mean KL" in shown and "sha256" in shown and "wrote m-Q4_K_M.gguf" in shown
    (tmp_path / "there").mkdir()
    assert main(["export", "m", "--gguf", "--out", "there"]) == 0
    assert (tmp_path / "there" / "m-Q4_K_M.gguf").is_file()


def test_a_run_keeps_its_exports(model, tmp_path, capsys):
    run = tmp_path / "runs" / "first"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").write_text("", encoding="utf-8")
    model.rename(run / "checkpoints" / "step-00000010")
    assert main(["export", "--gguf", "--quant", "F16"]) == 0  # the newest run
    assert (run / "exports" / "first-F16.gguf").is_file() and (run / "exports" / "certificate.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gguf", "--quant", "Q9"], "Q4_K_M"),
        (["--onnx", "--quant", "Q4_K_M"], "F32, INT8"),
        (["--hf", "--quant", "F16"], "leave --quant out"),
        (["--gguf", "--architecture", "granite"], "goes with --hf"),
        (["--gguf", "--out", "model.bin"], "must end in .gguf"),
        (["--gguf", "--text", "nowhere.txt"], "nowhere.txt"),
        (["--hf", "--out", "m/config.json"], "is a file"),
    ],
)
def test_wrong_usage_is_told_in_one_line(options, message, model, capsys):
    assert main(["export", "m", *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_what_is_exported_already_is_told(model, tmp_path, capsys):
    assert main(["export", "m", "--gguf", "--quant", "F16"]) == 0
    assert main(["export", "m-F16.gguf", "--hf"]) == 1
    assert "GGUF already" in capsys.readouterr().err
    assert main(["export", "nothing-here", "--hf"]) == 1
    assert main(["export", "m"]) == 2  # no form named


def test_a_folder_that_is_no_model_is_told(model, tmp_path, capsys):
    (model / "config.json").unlink()
    (model / "config.json").write_text('{"architectures": ["BertModel"]}', encoding="utf-8")
    assert main(["export", "m", "--gguf"]) == 1
    assert "BertModel" in capsys.readouterr().err
    (model / "tokenizer.json").unlink()
    assert main(["export", "m", "--gguf"]) == 1


@pytest.mark.parametrize("options", [["--gguf"], ["--onnx"], ["--hf"]])
def test_a_tokenizer_longer_than_the_embedding_is_refused_before_any_work(
    options, make_model, tmp_path, capsys
):
    """By every format and by what loads a folder to run it; a longer embedding is a padded vocabulary."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for index in range(512, 521):  # the embedding has 520 rows
        token = {**definition["added_tokens"][0], "id": index, "content": f"<extra_{index}>"}
        definition["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    assert main(["export", str(folder), *options, "--out", str(tmp_path / "out.gguf")]) == 1
    assert "has 521 tokens and the model only 520; they do not belong together" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    with pytest.raises(UserError, match="521 tokens"):
        load(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="file names there are Unicode in every locale")
def test_a_path_with_accents_in_a_locale_without_utf_8(model, tmp_path):
    """By GGUF and HF it works; ONNX Runtime cannot open such a path, which is said with the remedy."""
    model.rename(tmp_path / "modèle")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def run(*options):
        command = [sys.executable, "-m", "minicpm_edge", "export", "modèle", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)

    for options, name in ((("--gguf", "--quant", "Q8_0"), "modèle-Q8_0.gguf"), (("--hf",), "modèle-hf")):
        done = run(*options)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).exists()
    certificates = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))["certificates"]
    assert (
        list(certificates) == ["modèle-Q8_0.gguf"] and certificates["modèle-Q8_0.gguf"]["model"] == "modèle"
    )
    assert run("--hf").returncode == 0  # an export of ours is replaced
    done = run("--onnx", "--quant", "F32")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(b"error: ONNX Runtime cannot open")
    assert b"set PYTHONUTF8=1" in done.stderr
