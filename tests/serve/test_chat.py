"""``minicpm-edge chat``: through a pipe, with ``-p``, and in a real pseudo-terminal with Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from minicpm_serve import terminal
from minicpm_serve.terminal import Conversation

from minicpm_edge.cli.main import main
from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.errors import UserError


@pytest.fixture
def chat(model, monkeypatch, capsys):
    """``chat(*arguments, text=…)`` runs the command on the fake model; returns exit code, output and errors."""
    monkeypatch.setattr("minicpm_serve.cli._load", lambda _: model)

    def run(*arguments, text=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = main(["chat", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_one_answer(chat, model):
    assert chat("-p", "hello") == (0, "You said: hello\n", "")
    assert model.closed


def test_one_answer_to_standard_input(chat):
    assert chat("-p", "-", text="from a\npipe")[1] == "You said: from a\npipe\n"


def test_one_answer_as_json(chat):
    answer = json.loads(chat("-p", "hello", "--json", "--max-tokens", "3")[1])
    assert answer == {
        "text": "You", "finish_reason": "length", "num_prompt_tokens": 23, "num_completion_tokens": 3
    }  # fmt: skip


def test_every_option_reaches_the_engine(chat, model):
    chat(
        "-p", "hello", "--system", "be brief", "--temperature", "0", "--top-p", "0.5", "--top-k", "7", "--min-p", "0.1",
        "--seed", "9", "--stop", "x", "--stop", "y", "--max-tokens", "100",
    )  # fmt: skip
    assert model.params[0] == SamplingParams(
        temperature=0, top_p=0.5, top_k=7, min_p=0.1, seed=9, stop=("x", "y"), max_tokens=100
    )
    assert model.prompts[0].startswith("system: be brief\nuser: hello\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", ""], "the prompt is empty"),
        (["--json"], "goes with -p"),
        (["-p", "-"], "the prompt is empty"),
        (["-p", "x", "--temperature", "-1"], "temperature"),
        (["-p", "x", "--top-p", "nan"], "top_p"),
        (["-p", "x" * 3000], "context"),
        (["-p", "break the template"], "chat template"),
    ],
)
def test_what_cannot_work_is_one_line(chat, model, arguments, words):
    code, out, err = chat(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


def test_a_conversation_through_a_pipe(chat, model):
    code, out, err = chat(text="one\n\n  two  \nthree\n/exit\nnever\n")
    assert (code, err) == (0, "")
    assert out == "You said: one\nYou said: two\nYou said: three\n"
    assert model.prompts[1] == "user: one\nassistant: You said: one\nuser: two\nassistant: "


def test_commands(chat, model):
    _, out, _ = chat(
        "--system",
        "first",
        text="one\n/reset\ntwo\n/system second\nthree\n/system\nfour\n/help\n/what\n/usr/bin\n",
    )
    assert model.prompts[1] == "system: first\nuser: two\nassistant: "
    assert model.prompts[2] == "system: second\nuser: three\nassistant: "
    assert model.prompts[3] == "user: four\nassistant: "
    assert "/reset" in out and "/what is not a command" in out
    assert "You said: /usr/bin" in out, "a path is a message"


def test_a_line_that_goes_on(chat):
    assert chat(text="one \\\ntwo\n")[1] == "You said: one \ntwo\n"


def test_a_conversation_that_outgrows_the_context_loses_its_beginning(chat, model):
    model.runner.context_length = 120
    code, _, err = chat(text="".join(f"question {number}\n" for number in range(6)))
    assert code == 0
    assert "no longer fits" in err
    assert model.prompts[-1].startswith("user: question")
    assert "question 0" not in model.prompts[-1]
    assert model.prompts[-1].endswith("user: question 5\nassistant: ")


def test_a_question_too_long_alone_is_refused(model):
    conversation = Conversation(model=model, params=SamplingParams())
    with pytest.raises(UserError, match="context"):
        list(conversation.ask("x" * 3000))
    assert conversation.turns == []


def test_escape_sequences_of_the_model_do_not_reach_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "a[31mb\n\tc"), (io.StringIO(), "a\x1b[31mb\n\tc\x9b")):
        monkeypatch.setattr("sys.stdout", stream)
        terminal._write("a\x1b[31mb\n\tc\x9b")
        assert stream.getvalue() == expected


def test_bytes_that_are_not_text_do_not_end_the_chat():
    result = run_fake(["chat"], stdin=b"caf\xe9\n\xff\xfe\nok\n")
    assert result.returncode == 0, result.stderr
    assert b"You said: ok" in result.stdout


def fake_command(arguments, model="seconds_a_token=0.02"):
    """A Python command line that runs ``minicpm-edge`` on the fake model, in a process of its own."""
    path = str(Path(__file__).with_name("conftest.py"))
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fake", {path!r})
fake = importlib.util.module_from_spec(spec)
sys.modules["fake"] = fake
spec.loader.exec_module(fake)
import minicpm_serve.cli
minicpm_serve.cli._load = lambda _: fake.FakeModel({model})
from minicpm_edge.cli.main import main
sys.exit(main({arguments!r}))
"""
    return [sys.executable, "-c", code]


def run_fake(arguments, stdin):
    return subprocess.run(fake_command(arguments, ""), input=stdin, capture_output=True, timeout=60)


class Terminal:
    """A process in a pseudo-terminal, with what it has printed so far."""

    def __init__(self, arguments):
        import pty

        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            command = fake_command(arguments)
            os.execv(command[0], command)
        self.shown = b""

    def interrupt(self):
        # Between showing a prompt and waiting for a key, Python's readline notes no signal.
        self.wait_for_sleep()
        self.type("\x03")

    def wait_for_sleep(self, seconds=60):
        """Until the process waits for something: a key, or the next token."""
        time.sleep(0.3)
        end = time.monotonic() + seconds
        state = Path(f"/proc/{self.pid}/stat")
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "the process never waits"
            time.sleep(0.01)

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def expect(self, text, seconds=60):
        end = time.monotonic() + seconds
        while text.encode() not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in {self.shown!r}"
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.shown += os.read(self.descriptor, 65536)
        _, _, self.shown = self.shown.partition(text.encode())

    def exit_code(self):
        _, status = os.waitpid(self.pid, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program():
    chat = Terminal(["chat"])
    chat.expect("/help")
    chat.type("count to 400\n")
    chat.expect("1 2 3 4 5")
    chat.interrupt()
    chat.expect("(stopped)")
    chat.type("still there?\n")
    chat.expect("You said: still there?")
    chat.interrupt()
    chat.expect("Ctrl-C again")
    chat.type("yes\n")
    chat.expect("You said: yes")
    chat.type("/exit\n")
    assert chat.exit_code() == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_twice_at_the_prompt_and_ctrl_d_leave():
    chat = Terminal(["chat"])
    chat.expect("› ")
    chat.interrupt()
    chat.expect("Ctrl-C again")
    chat.interrupt()
    chat.expect("interrupted")
    assert chat.exit_code() == 130
    chat = Terminal(["chat"])
    chat.expect("› ")
    chat.type("\x04")
    assert chat.exit_code() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_an_error_in_a_terminal_does_not_end_the_chat():
    chat = Terminal(["chat"])
    chat.expect("› ")
    chat.type("break the template\n")
    chat.expect("error: the chat template")
    chat.type("hello\n")
    chat.expect("You said: hello")
    chat.type("/exit\n")
    assert chat.exit_code() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to one process")
def test_serve_tells_where_it_is_and_ends_at_once_on_ctrl_c():
    process = subprocess.Popen(
        fake_command(["serve", "--port", "0"], "seconds_a_token=0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        body = json.dumps(
            {"messages": [{"role": "user", "content": "count to 400"}], "stream": True}
        ).encode()
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as stream:
            assert stream.readline().startswith(b"data: ")
            process.send_signal(signal.SIGINT)
            assert b"shutting_down" in stream.read()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "interrupted\n"
