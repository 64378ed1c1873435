"""What every kernel benchmark shares: timing on the card, the correctness gate, and result files.

A benchmark times all peers in one run on one card, refuses to time when its own results are wrong, and writes
`results/NAME.json` with date, hardware and versions after every peer, so that a run cut short keeps what it has. A peer
that is absent or fails is a line that says so. README tables are made from those files only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
BF16_PEAK_TFLOPS = 989.0  # dense bf16 of an H100 or H200 SXM, the denominator of every MFU here

T = TypeVar("T")


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


def attempt(function: Callable[[], T]) -> tuple[T | None, str]:
    """(what `function` returns, ""), or (None, why it failed): one peer's fault must not cost the others' lines."""
    try:
        return function(), ""
    except torch.cuda.OutOfMemoryError:
        return None, "out of memory"
    except Exception as error:  # noqa: BLE001  peers fail in ways of their own
        traceback.print_exception(error)
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:100]
    finally:
        torch.cuda.empty_cache()


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
        if allowed == float("inf"):
            raise GateError(f"{name}: torch's own tensor {index} is not finite, so there is no measure")
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


def missing(op: str, shape: str, peer: str, rate_unit: str, note: str) -> Row:
    """The line of a peer that gave no number; `note` says why."""
    return Row(op=op, shape=shape, peer=peer, milliseconds=None, rate=None, rate_unit=rate_unit, note=note)


@cache
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
        "commit": _answer("git", "rev-parse", "--short", "HEAD"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "SMs": properties.multi_processor_count,
            "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    else:
        result |= {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return result


class Results:
    """Rows of one benchmark, printed as they come and each time written to `results/NAME.json`."""

    def __init__(self, name: str, **extra: Any) -> None:
        self._name, self._extra = name, extra
        self._rows: list[Row] = []

    def add(self, *rows: Row) -> None:
        """Print and write, marked as not complete."""
        for row in rows:
            time = "-" if row.milliseconds is None else f"{row.milliseconds:.3f} ms"
            rate = "-" if row.rate is None else f"{row.rate:.4g} {row.rate_unit}"
            memory = "" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f} MiB"
            line = f"{row.op:32} {row.shape:36} {row.peer:24} {time:>12} {rate:>16} {memory:>12} {row.note}"
            print(line, flush=True)
        self._rows += rows
        self._write(complete=False)

    def finish(self) -> None:
        """Write once more: nothing is missing."""
        self._write(complete=True)

    def _write(self, *, complete: bool) -> None:
        rows = [asdict(row) for row in self._rows]
        write_json(self._name, {"complete": complete, "rows": rows, **self._extra})


def report(name: str, rows: Sequence[Row], **extra: Any) -> None:
    """Print the rows as a table and write them to `results/NAME.json`."""
    results = Results(name, **extra)
    results.add(*rows)
    results.finish()


def run_benchmark(
    name: str,
    shapes: Sequence[Any],
    *,
    check: Callable[[Any], None],
    peers: Callable[[Any], Mapping[str, Any]],
    time_peer: Callable[[Any, str, Any], list[Row]],
    tune: Callable[[Any], Iterator[list[Row]]],
) -> None:
    """A benchmark's command line: check every shape, then time its peers, or with --tune our own other tiles."""
    parser = argparse.ArgumentParser(description=f"time {name} beside its peers")
    parser.add_argument(
        "--tune", action="store_true", help="time other tiles of our kernels instead of peers"
    )
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    arguments = parser.parse_args()
    require_cuda()
    shapes = [shape for shape in shapes if arguments.only in shape.name]
    faults = {shape.name: attempt(partial(check, shape))[1] for shape in shapes}
    if any(faults.values()):
        lines = [f"{shape}: {fault or 'right'}" for shape, fault in faults.items()]
        raise SystemExit("\n".join(["error: a check failed, so nothing is timed", *lines]))
    results = Results(f"{name}_tune" if arguments.tune else name, gate="passed", shapes=list(faults))
    for shape in shapes:
        if arguments.tune:
            for rows in tune(shape):
                results.add(*rows)
            continue
        for label, peer in peers(shape).items():
            results.add(*time_peer(shape, label, peer))
    results.finish()


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


def _answer(*command: str) -> str | None:
    """What a program prints, None where it cannot be asked."""
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
