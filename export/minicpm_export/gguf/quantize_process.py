"""llama.cpp's quantiser as a process of its own, which can be stopped.

The call lasts minutes and never looks at signals; inside our process Ctrl-C would wait for its end, and an assertion
that fails in it would take our process along. Arguments: source, target, number of the file type, threads, bytes of
buffer. What goes wrong is on standard error.
"""

from __future__ import annotations

import os
import sys

import llama_cpp

from minicpm_export.gguf.llama_log import quiet_log


def main(source: str, target: str, file_type: str, threads: str, buffer_bytes: str) -> int:
    """Quantise; the exit code is 0 or llama.cpp's status."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(file_type), int(threads)
    if hasattr(params, "max_buf_size"):  # since llama-cpp-python 0.3.36
        params.max_buf_size = int(buffer_bytes)
    errors = quiet_log()
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if status != 0:
        print("; ".join(errors) or f"status {status}", file=sys.stderr)
    return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
