"""Settings that must hold before any test module is imported, the order of tests, and a look at slow ones."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest

# Triton decides between its CPU interpreter and the GPU compiler while it is being imported, and a test
# module of any part may import it (through torch.compile, or transformers). So the choice is made here,
# once, for the whole session: kernels are interpreted, unless benchmarks/gpu.sh runs the kernel tests on a
# card with MINICPM_TEST_DEVICE=cuda. Tests that need the compiler (cubins for sm_90) run it in a process of
# their own, without this variable.
if os.environ.get("MINICPM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# pytest-xdist runs a process for each core, and each would have a thread of torch for each core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has them ignore Ctrl-C, and they would pass that on to the
# programs whose answer to Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_SECONDS = 2.0
"""A test that takes more processor time than this is to be marked slow: ``.ci/check.py --fast`` leaves it out."""
DEFAULT_SLOW_SECONDS = 5.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, by their slow tests, so that no process is left alone with one at the end."""
    seconds: dict[object, float] = {}
    for item in items:
        mark = item.get_closest_marker("slow")
        own = 0.0 if mark is None else mark.kwargs.get("seconds", DEFAULT_SLOW_SECONDS)
        seconds[item.path] = seconds.get(item.path, 0.0) + own
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """An engine sets the number of torch's threads for the whole process: the next test gets the usual one again.

    More threads than cores wait for one another at every operation: some tests took ten times as long.
    """
    yield
    torch = sys.modules.get("torch")
    if "PYTEST_XDIST_WORKER" in os.environ and torch is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note the processor time of each test and of the processes it waited for: on a busy machine the clock lies."""
    began = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", round(sum(os.times()[:4]) - began, 2)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that should be marked slow and are not."""
    for report in terminalreporter.getreports("passed"):
        seconds = dict(report.user_properties).get("cpu_seconds", 0.0)
        if seconds > SLOW_SECONDS and "slow" not in report.keywords:
            terminalreporter.write_line(
                f"SLOW {report.nodeid}: {seconds} s of processor time, not marked slow"
            )
