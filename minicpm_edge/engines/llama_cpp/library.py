"""The library itself: how it is loaded, kept quiet, and asked what went wrong.

llama.cpp's threads meet at hundreds of barriers a token, and GNU OpenMP decides once, while it is loaded, how long a
thread spins at one before it sleeps. By default it spins for milliseconds: fastest while every core is free, but once
another program takes a core, threads spin on the ones that their partners need, and decoding all but stops. A short
spin costs a fifth of the best speed, and on a busy machine keeps nearly all there is (figures in docs/log.md). Who
sets GOMP_SPINCOUNT or OMP_WAIT_POLICY is obeyed.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from typing import Any

SPIN_COUNT = "300"


def _load() -> Any:
    """Import llama_cpp, with ``SPIN_COUNT`` in the environment for as long as OpenMP reads it."""
    name = "GOMP_SPINCOUNT"
    chosen = name in os.environ or "OMP_WAIT_POLICY" in os.environ
    if not chosen:
        os.environ[name] = SPIN_COUNT
    try:
        import llama_cpp

        return llama_cpp
    finally:
        if not chosen:
            del os.environ[name]


llama = _load()

_ERROR = 4  # a ggml_log_level
_errors: deque[str] = deque(maxlen=8)


def _log(level: int, text: bytes, _: object) -> None:
    if level == _ERROR:
        _errors.append(text.decode("utf-8", errors="replace").strip())


# llama.cpp prints nothing; what it says of an error is kept for the message of a failed load.
_keep_log = llama.llama_log_callback(_log)


def start() -> None:
    """Make llama.cpp ready for a model, and quiet."""
    llama.llama_log_set(_keep_log, ctypes.c_void_p())
    llama.llama_backend_init()
    forget_errors()


def forget_errors() -> None:
    """Call before what may fail, so that :func:`first_error` tells of that alone."""
    _errors.clear()


def first_error() -> str:
    """What went wrong, without the name of the function that says so; the errors after it are consequences."""
    return _errors[0].split(": ", 1)[-1] if _errors else "it gives no reason"
