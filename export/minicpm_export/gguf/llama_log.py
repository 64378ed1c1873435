"""llama.cpp's log, kept off the terminal; what it says of errors goes into our messages."""

from __future__ import annotations

import ctypes

import llama_cpp

ERROR_LEVEL, CONTINUED_LEVEL = 4, 5  # ggml_log_level

_errors: list[str] = []
_last_level = 0


def _collect(level: int, text: bytes, _: object) -> None:
    global _last_level
    _last_level = _last_level if level == CONTINUED_LEVEL else level
    if _last_level == ERROR_LEVEL:
        _errors.append(text.decode("utf-8", "replace").strip())


_callback = llama_cpp.llama_log_callback(_collect)  # llama.cpp keeps a pointer: it must outlive every call


def quiet_log() -> list[str]:
    """Keep llama.cpp's log off the terminal from now on; returns the list that its errors will be added to."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    _errors.clear()
    return _errors
