"""What ``doctor`` tells."""

import json

from minicpm_edge.cli.main import main


def test_doctor_says_which_kernels_and_why(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]["version"]
    assert set(report["kernels"]) >= {"attention", "moe", "linear_cross_entropy"}
    assert all(kernel["reason"] for kernel in report["kernels"].values())


def test_a_wrong_override_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("MINICPM_KERNELS", "cuda")
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: MINICPM_KERNELS='cuda'") and error.count("\n") == 1
