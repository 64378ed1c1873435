"""``load(model)``: one call for a run, a checkpoint, a Hugging Face folder, a ``.gguf`` or an ONNX folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_edge.cores import affinity_cpus, usable_cpus
from minicpm_edge.errors import UserError

if TYPE_CHECKING:
    from minicpm_edge.engines.base import ModelRunner
    from minicpm_edge.formats.resolve import ModelRef
    from minicpm_edge.language_model import LanguageModel

MAX_CONTEXT, MAX_THREADS = 1 << 24, 1024
# Above this many, half of the logical CPUs are hyper-threads or efficiency cores, which slow matmuls down.
FEW_CPUS = 4


def load(
    model: str | Path | None = None,
    *,
    context_length: int | None = None,
    threads: int | None = None,
    root: Path = Path("runs"),
) -> LanguageModel:
    """Load a model for use: ``.gguf`` by llama.cpp, ONNX by ONNX Runtime, anything else by torch.

    Args:
        model: as :func:`~minicpm_edge.formats.resolve.resolve_model` takes it; None is the newest run, else the demo
            model.
        context_length: tokens of prompt and answer together, 1 to 2**24; by default what the model was trained for
            (GGUF: at most 8192, for the memory's sake).
        threads: CPU threads to compute with, 1 to 1024; by default one for each real core.
        root: where runs are.

    Raises:
        UserError: for no such model, a broken one, a setting out of range, or a runtime that is not installed.
    """
    from minicpm_edge.engines.sequential import SequentialEngine
    from minicpm_edge.formats.resolve import resolve_model
    from minicpm_edge.language_model import LanguageModel

    _check("context_length", context_length, MAX_CONTEXT)
    _check("threads", threads, MAX_THREADS)
    found = resolve_model(model, root=root, demo=True)
    runner = _runner(found, context_length, threads or default_threads())
    return LanguageModel(SequentialEngine(runner), name=found.name)


def default_threads() -> int:
    """One thread for each real core this process may use, as far as that can be told."""
    cpus = affinity_cpus()
    return min(cpus if cpus <= FEW_CPUS else max(cpus // 2, FEW_CPUS), usable_cpus())


def _runner(found: ModelRef, context_length: int | None, threads: int) -> ModelRunner:
    if found.kind == "gguf":
        _require("llama_cpp", "serve", found)
        from minicpm_edge.engines.llama_cpp.runner import LlamaCppRunner
        from minicpm_edge.formats.gguf_header import check_gguf

        check_gguf(found.path)
        return LlamaCppRunner(found.path, context_length=context_length, threads=threads)
    if found.kind == "onnx":
        _require("onnxruntime", "serve", found)
        from minicpm_edge.engines.onnx import OnnxRunner

        return OnnxRunner(found.path, context_length=context_length, threads=threads)
    _require("torch", "train", found)
    from minicpm_edge.engines.torch import TorchRunner

    return TorchRunner(found.path, context_length=context_length, threads=threads)


def _require(package: str, extra: str, found: ModelRef) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{found.path} needs the package {package}, which is not installed: pip install 'minicpm-edge[{extra}]'"
        )


def _check(name: str, value: int | None, most: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and 1 <= value <= most):
        raise UserError(f"{name} must be a whole number from 1 to {most}")
