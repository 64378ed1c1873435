"""The emulator runs what Triton compiles, and a Triton that interprets does not compile."""

import os
from importlib.util import find_spec

collect_ignore_glob = []
if find_spec("triton") is None:
    # No test here can run. A skip would not do: pytest reads this file before it can skip anything.
    collect_ignore_glob = ["test_*.py"]
elif "TRITON_INTERPRET" in os.environ:
    # tests/conftest.py has switched the interpreter on, since both folders are tested in one session.
    collect_ignore_glob = ["test_emulator.py"]
