"""Repeat the tests that start processes of their own, on a machine kept busy, until one fails.

``python .ci/repeat.py --rounds 50`` in the developer's own environment; several rounds run at a time, so that they
compete for the cores with one another.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/core/model/test_sharding.py", "tests/training/test_distributed.py")


def one_round(number: int) -> bool:
    """Run the tests once; prints a line, and all that pytest said where it failed."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    last = (result.stdout.strip().splitlines() or ["nothing"])[-1]
    print(f"round {number}: {last} ({time.monotonic() - started:.0f} s)", flush=True)
    if result.returncode:
        print(result.stdout, result.stderr, sep="\n", flush=True)
    return result.returncode == 0


def main() -> None:
    """Run the rounds; exit code 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=2, help="rounds at a time (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} CPUs", flush=True)
    with ThreadPoolExecutor(arguments.at_once) as pool:
        passed = list(pool.map(one_round, range(1, arguments.rounds + 1)))
    print(f"{sum(passed)} of {len(passed)} rounds passed")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
