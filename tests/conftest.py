"""Settings that must hold before any test module is imported."""

import os
import signal

# Triton decides between its CPU interpreter and the GPU compiler while it is being imported, and a test
# module of any part may import it (through torch.compile, or transformers). So the choice is made here,
# once, for the whole session: kernels are interpreted, unless benchmarks/gpu.sh runs the kernel tests on a
# card with MINICPM_TEST_DEVICE=cuda. Tests that need the compiler (cubins for sm_90) run it in a process of
# their own, without this variable.
if os.environ.get("MINICPM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts the tests in the background has them ignore Ctrl-C, and they would pass that on to the
# programs whose answer to Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
