"""What the machine is and what it can do: device, precision, peak FLOP/s, and a record of it for the run."""

from __future__ import annotations

import platform
import time
from typing import Any, Literal

import torch

from minicpm_edge.errors import UserError
from minicpm_edge.model.config import ModelConfig

Precision = Literal["bf16", "fp32"]

# Dense peak of the data sheets in FLOP/s, by a part of the device's name: (bf16, fp32 or TF32 off).
DATA_SHEET = {
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "RTX 4090": (165e12, 82.6e12),
}

NUM_TRIALS = 12  # matrix products; the best one counts, as others may be using the machine


def choose_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's GPU, then the CPU. Raises :class:`UserError` for a device that is not here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def choose_precision(setting: str, device: torch.device) -> Precision:
    """``auto`` is bf16 where the hardware multiplies bf16 natively, else fp32 (emulation is slower than fp32)."""
    if setting == "bf16" or (setting == "auto" and _computes_bf16(device)):
        return "bf16"
    return "fp32"


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    return any(check() for check in (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported))


def dtype_of(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def peak_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """Peak FLOP/s and its source: the data sheet of a known GPU, else the best of a few matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (bf16, fp32) in DATA_SHEET.items():
            if part in name:
                return (bf16 if precision == "bf16" else fp32), "data sheet"
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype_of(precision))
    best = float("inf")
    for _ in range(NUM_TRIALS):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, "measured matrix product"


def flops_per_token(config: ModelConfig, num_parameters: int, sequence_length: int) -> float:
    """Training FLOPs a token: 6N + 12·L·d·T, N being the parameters at work outside the embedding plus the head once.

    ``num_parameters`` leaves the embedding out; attention is counted over full sequences, as PaLM and nanoGPT do.
    """
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim
    return 6 * (num_parameters + head) + 12 * config.num_hidden_layers * width * sequence_length


def environment() -> dict[str, Any]:
    """Versions and hardware, for environment.json."""
    import os
    from importlib.metadata import version

    record: dict[str, Any] = {
        "minicpm_edge": version("minicpm-edge"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        record["cuda"] = torch.version.cuda
        record["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return record


def _cpu_name() -> str:
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
