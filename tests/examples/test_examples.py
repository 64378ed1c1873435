"""The examples, run as a user runs them, on the model that one of them makes."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import httpx
import pytest

from minicpm_edge import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="one example is a shell script"),
]
for package in ("torch", "pyarrow", "llama_cpp", "gguf", "fastapi", "openai"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTION = "What does the for statement do?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``train_on_a_folder.sh`` has run: ``mine/model.gguf`` and ``runs/mine``."""
    root = tmp_path_factory.mktemp("examples")
    corpus = root / "my text"
    corpus.mkdir()
    for name, text in list(pydoc_data.topics.topics.items())[:40]:
        (corpus / f"{name}.txt").write_text(text, encoding="utf-8")
    chat = {"messages": [*MESSAGES, {"role": "assistant", "content": "It repeats a block for each item."}]}
    (corpus / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 200, encoding="utf-8")
    run(root, "sh", EXAMPLES / "train_on_a_folder.sh", corpus, "0.15")
    assert json.loads((root / "mine" / "certificate.json").read_text(encoding="utf-8"))
    return root


@pytest.fixture(scope="module")
def gguf(workspace: Path) -> Path:
    return workspace / "mine" / "model.gguf"


def environment() -> dict[str, str]:
    """With the commands of this interpreter's environment first, as in an activated one."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path, *command: object) -> str:
    """What a command prints; it must succeed and have nothing to complain of."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@contextmanager
def running(folder: Path, *command: object, **variables: str) -> Iterator[str]:
    """A server in a process of its own; the address that it announces."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=folder, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                return
        pytest.fail("".join(lines))
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def test_every_example_is_tested_and_listed():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    source = Path(__file__).read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert len(names) == 6
    for name in names:
        assert f"[{name}]({name})" in readme and name.removesuffix(".py") in source


def test_chat_in_python(workspace, gguf):
    printed = run(workspace, sys.executable, EXAMPLES / "chat_in_python.py", gguf, QUESTION)
    with load(gguf) as lm:
        assert printed == lm.chat(MESSAGES, max_tokens=200, temperature=0.7, seed=0) + "\n"
    assert printed.strip()
    done = subprocess.run(
        [sys.executable, EXAMPLES / "chat_in_python.py", "no.gguf", "x"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: no model at no.gguf")


def test_stream_in_asyncio(workspace, gguf):
    questions = [f"Question {number}" for number in range(3)]
    printed = run(workspace, sys.executable, EXAMPLES / "stream_in_asyncio.py", gguf, *questions)
    with load(gguf) as lm:
        for question in questions:
            answer = lm.chat([{"role": "user", "content": question}], max_tokens=60, seed=0)
            assert f"Q: {question}\nA: {answer}\n" in printed


def test_fastapi_app(workspace, gguf):
    command = (sys.executable, "-m", "uvicorn", "--app-dir", EXAMPLES, "fastapi_app:app", "--port", "0")
    with running(workspace, *command, MODEL=str(gguf)) as url:
        answer = httpx.post(f"{url}/explain", json={"text": "print(1)"}, timeout=60)
        refused = httpx.post(f"{url}/explain", json={"text": "long " * 5000}, timeout=60)
    assert (answer.status_code, refused.status_code) == (200, 400)
    assert "context" in refused.json()["detail"]
    with load(gguf) as lm:
        message = {"role": "user", "content": "Explain in one sentence:\nprint(1)"}
        assert answer.text == lm.chat([message], max_tokens=100, temperature=0)


def test_openai_client(workspace, gguf):
    with running(workspace, "minicpm-edge", "serve", gguf, "--port", "0") as url:
        printed = run(workspace, sys.executable, EXAMPLES / "openai_client.py", QUESTION, url)
    with load(gguf) as lm:
        answer = lm.chat(MESSAGES, max_tokens=100, temperature=0)
        assert printed.startswith(f"{answer}\n({len(lm.chat_prompt(MESSAGES))} tokens read, ")


def test_notebook(workspace, monkeypatch):
    """Its code cells, one after the other, where ``load()`` finds the run."""
    monkeypatch.chdir(workspace)
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, object] = {}
    with redirect_stdout(StringIO()) as printed:
        for number, cell in enumerate(cells):
            exec(compile(cell, f"cell {number}", "exec"), namespace)
    assert namespace["lm"].name == "mine"
    assert "1.5: " in printed.getvalue()
    assert namespace["nearness"][0][0] == pytest.approx(1, abs=1e-4)
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "outputs are not kept"
    assert shutil.which("minicpm-edge", path=environment()["PATH"])
