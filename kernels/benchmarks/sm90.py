"""Compile every kernel in every configuration for sm_90 and judge what the compiler made; no GPU needed.

`python kernels/benchmarks/sm90.py` writes `results/sm90.md`; `--check` fails where the file would differ or a limit is
broken: stack use or spills, shared memory, registers, tensor-core instructions where a kernel needs them.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

# Before Triton is imported: its interpreter, which tests switch on, cannot compile.
os.environ.pop("TRITON_INTERPRET", None)
# The test tools are not installed.
sys.path.append(str(Path(__file__).parents[1] / "testing"))

import triton
from minicpm_kernels_testing.cases import all_cases
from minicpm_kernels_testing.sm90_compile import Resources, compile_sm90, resources

TRITON_VERSION = "3.6.0"  # another compiler makes another table
TABLE = Path(__file__).parent / "results" / "sm90.md"

HEAD = """\
# What the compiler makes of every kernel on sm_90

Made by `kernels/benchmarks/sm90.py` with Triton {version}, without a GPU; checked by the tests. Registers and stack
are per thread, shared memory in bytes per CTA; blocks are the CTAs that fit one SM at once, and occupancy their share
of its 64 warps. HGMMA are Hopper's tensor-core instructions, HMMA the older, slower ones; TMA is the bulk
copy engine. Counts are of instructions in the program, not of executions.

The last three columns are of the main loop: the cycles for which one warp keeps each unit of its SM sub-partition busy
in one iteration, if it never waits (rates and their sources: `minicpm_kernels_testing.sass`). The largest is a lower
bound; by how much another exceeds `tensor`, that much of the tensor cores' rate is out of reach. Waits are not in it,
nor is the bandwidth of shared memory, all of which a 64x64 MMA with both operands there takes. Where a loop also stores
its results (`moe_rows`), `issue` counts that as if it were done in every iteration. Warp-specialised kernels (`gluon`)
change their registers as they start; the table has those they are launched with.

What the table says: nothing spills. Attention's forward at head dim 64 asks as much of the exponentials and, in
Triton, of the issue slots as of the tensor cores, so that only overlap makes it fast; its backward, attention at head
dim 128 and the experts' matmuls ask most of the tensor cores. Kernels with one CTA per SM hide latency by their copies
in flight, not by other CTAs.

"""
COLUMNS = (
    "kernel",
    "registers",
    "stack",
    "shared memory",
    "threads",
    "blocks",
    "occupancy",
    "HGMMA",
    "HMMA",
    "TMA loads",
    "TMA stores",
    "spills",
    "tensor",
    "special",
    "issue",
)


def cells(name: str, used: Resources) -> tuple[str | int, ...]:
    """One line of the table."""
    return (
        name,
        used.registers,
        used.stack,
        used.shared_memory,
        used.threads,
        used.blocks_per_sm,
        f"{used.occupancy:.0%}",
        used.hgmma,
        used.hmma,
        used.tma_loads,
        used.tma_stores,
        used.spill_loads + used.spill_stores,
        *((used.loop.tensor, used.loop.special, used.loop.issue) if used.loop else ("", "", "")),
    )


def line(values: Iterable[object]) -> str:
    """A row in Markdown."""
    return "| " + " | ".join(str(value) for value in values) + " |\n"


def main() -> int:
    """Write or check the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    if triton.__version__ != TRITON_VERSION:
        raise SystemExit(f"error: the table is of Triton {TRITON_VERSION}, this is {triton.__version__}")
    table = HEAD.format(version=TRITON_VERSION) + line(COLUMNS) + line("---" for _ in COLUMNS)
    problems = []
    for case in all_cases():
        used = resources(compile_sm90(case))
        table += line(cells(case.name, used))
        broken = used.broken_limits(needs_tensor_cores=case.needs_tensor_cores)
        problems += [f"{case.name} {problem}" for problem in broken]
    if arguments.check:
        written = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
        difference = list(
            difflib.unified_diff(written.splitlines(), table.splitlines(), "written", "now", lineterm="")
        )
        if difference:
            problems += [f"{TABLE.name} is out of date; run {Path(__file__).name}", *difference]
    else:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table, encoding="utf-8", newline="\n")
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
