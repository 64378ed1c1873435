"""What ``doctor`` tells."""

import json
import re
from importlib.metadata import requires

from minicpm_edge.cli.doctor import PACKAGES
from minicpm_edge.cli.main import main


def test_doctor_says_which_kernels_and_why(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]["version"]
    assert set(report["kernels"]) >= {"attention", "moe", "linear_cross_entropy"}
    assert all(kernel["reason"] for kernel in report["kernels"].values())


def test_the_extra_it_names_installs_the_package():
    pattern = r"([\w-]+).*; extra == ['\"](\w+)['\"]"
    found = {match.groups() for entry in requires("minicpm-edge") if (match := re.match(pattern, entry))}
    named = {(name, extra) for name, (_, _, extra) in PACKAGES.items() if extra is not None}
    assert len(named) == len(PACKAGES) - 1, "all but Triton, which torch brings"
    assert named <= found


def test_a_wrong_override_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("MINICPM_KERNELS", "cuda")
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: MINICPM_KERNELS='cuda'") and error.count("\n") == 1
