"""What every kernel benchmark shares: timing on the card, the correctness gate, and result files.

A benchmark times all peers in one run on one card, refuses to report when its own results are wrong, and
writes `results/NAME.json` with date, hardware and versions. README tables are made from those files only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
BF16_PEAK_TFLOPS = 989.0  # dense bf16 of an H100 or H200 SXM, the denominator of every MFU here


class GateError(RuntimeError):
    """A kernel's result is wrong, so its speed is not reported."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: `peer` doing `op` on `shape`; `rate` in `rate_unit`, None where nothing was measured."""

    op: str
    shape: str
    peer: str
    milliseconds: float | None
    rate: float | None
    rate_unit: str
    peak_memory_mib: float | None = None
    note: str = ""


def require_cuda() -> None:
    """End the benchmark with one clear line where there is no card: a number is never guessed."""
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a CUDA device and found none; no result was written")


def time_ms(
    function: Callable[[], object],
    *,
    warmup: int = 5,
    repeats: int = 20,
    prepare: Callable[[], object] | None = None,
) -> float:
    """Median milliseconds of `function` on the card, L2 flushed before each call, `prepare` not timed.

    The card idles half a millisecond before each call, so that the host is ahead and the time to launch a kernel is
    hidden, as it is in training.
    """
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")  # several times the 50 MB L2
    for _ in range(warmup):
        if prepare is not None:
            prepare()
        function()
    events = [_event_pair() for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        if prepare is not None:
            prepare()
        flush.zero_()
        torch.cuda._sleep(1_000_000)  # cycles
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in events]
    return statistics.median(times)


def _event_pair() -> tuple[Any, Any]:
    new_event: Any = torch.cuda.Event
    return new_event(enable_timing=True), new_event(enable_timing=True)


def peak_memory_mib(function: Callable[[], object]) -> float:
    """MiB that `function` allocates above what was held before it."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference; NaN or infinity counts as infinite."""
    difference = (result.double() - reference.double()).square().mean().sqrt()
    scale = reference.double().square().mean().sqrt()
    error = float(difference / scale.clamp(min=1e-30))
    return error if error == error else float("inf")


def gate(
    name: str,
    results: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    peers: Sequence[torch.Tensor],
    *,
    factor: float = 2.0,
    floor: float = 1e-6,
) -> None:
    """Refuse to go on unless each result's error to its fp32 reference is at most `factor` times torch's own.

    `results`, `references` (fp32) and `peers` (torch's op in the same precision) are outputs and gradients in
    one order. `floor` is the error below which two sums in another order of additions are the same.
    """
    for index, (result, reference, peer) in enumerate(zip(results, references, peers, strict=True)):
        error, allowed = relative_error(result, reference), factor * relative_error(peer, reference)
        if not error <= max(allowed, floor):
            raise GateError(
                f"{name}: tensor {index} has error {error:.2e}, allowed {max(allowed, floor):.2e}"
            )


def optional_peer(distribution: str) -> str | None:
    """Version of an installed peer, or None (the benchmark then says that it is absent)."""
    try:
        return metadata.distribution(distribution).version
    except metadata.PackageNotFoundError:
        return None


def absent(op: str, shape: str, peer: str, rate_unit: str) -> Row:
    """The line of a peer that is not installed."""
    return Row(
        op=op, shape=shape, peer=peer, milliseconds=None, rate=None, rate_unit=rate_unit, note="absent"
    )


def environment() -> dict[str, Any]:
    """Date, card, driver and the versions a reader needs to repeat a run."""
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": optional_peer("triton"),
        "liger_kernel": optional_peer("liger-kernel"),
        "cut_cross_entropy": optional_peer("cut-cross-entropy"),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    else:
        result |= {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return result


def report(name: str, rows: Sequence[Row], **extra: Any) -> Path:
    """Print the rows as a table and write them to `results/NAME.json`; returns the file."""
    for row in rows:
        time = "-" if row.milliseconds is None else f"{row.milliseconds:.3f} ms"
        rate = "-" if row.rate is None else f"{row.rate:.4g} {row.rate_unit}"
        memory = "" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f} MiB"
        print(f"{row.op:32} {row.shape:36} {row.peer:24} {time:>12} {rate:>16} {memory:>12} {row.note}")
    return write_json(name, {"rows": [asdict(row) for row in rows], **extra})


def run_benchmark(
    name: str,
    shapes: Sequence[Any],
    *,
    check: Callable[[Any], None],
    peers: Callable[[Any], Mapping[str, Any]],
    time_peer: Callable[[Any, str, Any], list[Row]],
    tune: Callable[[], list[Row]],
) -> None:
    """A benchmark's command line: check every shape, then time its peers, or with --tune our own other tiles."""
    parser = argparse.ArgumentParser(description=f"time {name} beside its peers")
    parser.add_argument(
        "--tune", action="store_true", help="time other tiles of our kernels instead of peers"
    )
    arguments = parser.parse_args()
    require_cuda()
    for shape in shapes:
        check(shape)
    if arguments.tune:
        report(f"{name}_tune", tune())
        return
    rows = [
        row
        for shape in shapes
        for label, peer in peers(shape).items()
        for row in time_peer(shape, label, peer)
    ]
    report(name, rows, gate="passed")


def write_json(name: str, content: dict[str, Any]) -> Path:
    """Write `results/NAME.json` in one piece: a kill leaves the old file or the new."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(
        json.dumps({"environment": environment(), **content}, indent=1) + "\n", encoding="utf-8"
    )
    beside.replace(path)
    return path


def _commit() -> str | None:
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()
