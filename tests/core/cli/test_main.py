"""The command line itself."""

import json
import subprocess
import sys

import pytest

from minicpm_edge.cli import main as cli
from minicpm_edge.cli.command import Command
from minicpm_edge.errors import UserError

HEAVY = ("torch", "llama_cpp", "onnxruntime", "pyarrow", "matplotlib", "fastapi", "transformers", "numpy")


def test_help_lists_every_command_and_loads_nothing_heavy():
    script = (
        "import sys, json; from minicpm_edge.cli.main import main; code = main(['--help']); "
        f"print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *listing, last = done.stdout.splitlines()
    assert json.loads(last) == [0, []]
    for command in cli.ORDER:
        assert any(line.split()[:1] == [command] for line in listing), command


def test_usage_errors_exit_2(capsys):
    assert cli.main(["no-such-command"]) == 2
    assert "invalid choice" in capsys.readouterr().err


def fake_command(monkeypatch, error):
    def run(_arguments):
        raise error

    class Entry:
        @staticmethod
        def load():
            return Command(help="fails", add_arguments=lambda parser: None, run=run)

    monkeypatch.setattr(cli, "_find_commands", lambda: {"fail": Entry()})


def test_a_user_error_is_one_line_and_exit_1(monkeypatch, capsys):
    fake_command(monkeypatch, UserError("x is missing; make x"))
    assert cli.main(["fail"]) == 1
    assert capsys.readouterr().err == "error: x is missing; make x\n"


def test_ctrl_c_exits_130(monkeypatch):
    fake_command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["fail"]) == 130


def test_a_missing_package_names_the_remedy(monkeypatch, capsys):
    fake_command(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert cli.main(["fail"]) == 1
    assert "pip install 'minicpm-edge[all]'" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    fake_command(monkeypatch, OSError(28, "No space left on device", "runs/x"))
    assert cli.main(["fail"]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_torch_out_of_memory_is_one_line(monkeypatch, capsys):
    fake_command(
        monkeypatch, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert cli.main(["fail"]) == 1
    assert capsys.readouterr().err == "error: out of memory; a smaller model, batch or context needs less\n"


def test_a_bug_of_ours_is_one_line_too_and_a_traceback_with_debug(monkeypatch, capsys):
    fake_command(monkeypatch, KeyError("x"))
    assert cli.main(["fail"]) == 1
    assert "(internal error; rerun with --debug)" in capsys.readouterr().err
    with pytest.raises(KeyError):
        cli.main(["fail", "--debug"])
