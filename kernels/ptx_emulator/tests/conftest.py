"""The emulator runs what Triton compiles, and a Triton that interprets does not compile."""

import os

import pytest

pytest.importorskip("triton", reason="the emulator runs programs that Triton compiles (Linux)")

# tests/conftest.py switches the interpreter on where both folders are tested in one session.
collect_ignore = ["test_emulator.py"] if "TRITON_INTERPRET" in os.environ else []
