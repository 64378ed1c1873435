"""What holds for the files of the repository: their length, their versions, and that tools can read them."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    ".ci",
    "benchmarks",
    "docs",
    "examples",
    "export",
    "kernels",
    "minicpm_edge",
    "serve",
    "tests",
    "training",
)
MOST_LINES = 600


def name_of(requirement):
    """The package that a requirement is of, spelled in the one way that PyPI compares."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.fixture(scope="module")
def pinned():
    """Versions by package, as constraints.txt has them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "a version of every package, and no ranges"
    return {name_of(name): version for name, version in pairs}


def test_no_file_is_longer_than_the_stop():
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    long = {str(file): n for file in files if (n := len(file.read_text("utf-8").splitlines())) > MOST_LINES}
    assert not long


def test_every_package_that_is_asked_for_has_a_tested_version(pinned):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {name_of(requirement) for requirements in asked for requirement in requirements}
    assert names - pinned.keys() == {"minicpm-edge"}


def test_the_hooks_run_the_ruff_of_the_check(pinned):
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==([\d.]+)", config)) == {pinned["ruff"]}


def test_ci_runs_the_check_on_every_python_that_the_package_takes():
    yaml = pytest.importorskip("yaml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["check"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_forms_for_issues_can_be_shown():
    yaml = pytest.importorskip("yaml")
    forms = [file for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config"]
    assert {file.stem for file in forms} == {"bug", "feature"}
    for file in forms:
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert form["name"] and form["description"]
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(field["attributes"]["label"] for field in form["body"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize("script", [".ci/run", "benchmarks/gpu.sh"])
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_quick_check_names_what_its_environment_lacks():
    """Where a Python has nothing installed, it says so in one line, before any step."""
    command = [sys.executable, "-I", "-S", ROOT / ".ci/check.py", "--fast"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "ruff, mypy, pytest, xdist" in done.stderr and ".[dev]" in done.stderr
