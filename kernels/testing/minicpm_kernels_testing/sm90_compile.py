"""Compile Triton kernels for Hopper (sm_90) on a machine without a GPU and read what the compiler made.

`cases/` lists what production launches; tests and `kernels/benchmarks/sm90.py` compile all of it. Triton must be
installed; no driver and no card is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpm_kernels_testing.sass import LoopLoad, main_loop

SHARED_MEMORY_LIMIT = 232_448  # bytes one block may use on sm_90
REGISTER_FILE = 65_536  # 32-bit registers of one SM
_SHARED_MEMORY_OF_MULTIPROCESSOR = 233_472
_RESERVED_SHARED_MEMORY = 1_024  # taken by the system from every block
_MOST_CYCLES_FOR_A_TENSOR_CYCLE = 1.25  # what the main loop of a product may ask of any other unit


@dataclass(frozen=True, kw_only=True)
class Sm90Case:
    """One kernel in one configuration that production launches.

    `types` gives Triton's type for every run-time argument (`*bf16`, `i32`, `tensordesc<bf16[128,64]>`),
    `constants` the `tl.constexpr` arguments, `divisible_by_16` the integers that launches make multiples of
    16 (pointers always are), `options` what a launch passes beside arguments (`num_warps`, `num_stages`).
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_tensor_cores: bool = False


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel uses: registers and stack of a thread, a block's size, instruction counts.

    ``loop`` is of the main loop; a kernel without HGMMA has none.
    """

    registers: int
    stack: int
    shared_memory: int
    threads: int
    hgmma: int
    hmma: int
    tma_loads: int
    tma_stores: int
    spill_loads: int
    spill_stores: int
    loop: LoopLoad | None

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit a Hopper SM at once (registers are handed out 256 to a warp)."""
        warps = self.threads // 32
        registers_of_warp = -(-self.registers * 32 // 256) * 256
        return min(
            REGISTER_FILE // (registers_of_warp * warps),
            _SHARED_MEMORY_OF_MULTIPROCESSOR // (self.shared_memory + _RESERVED_SHARED_MEMORY),
            2_048 // self.threads,
            32,
        )

    @property
    def occupancy(self) -> float:
        """Resident warps over the 64 that an SM can hold."""
        return self.blocks_per_sm * self.threads / 2_048

    def broken_limits(self, *, needs_tensor_cores: bool) -> list[str]:
        """Say which limits the kernel breaks; an empty list is a pass."""
        problems = []
        if self.stack:
            problems.append(f"uses {self.stack} bytes of stack")
        if self.spill_loads or self.spill_stores:
            problems.append(f"spills ({self.spill_loads} local loads, {self.spill_stores} local stores)")
        if self.shared_memory > SHARED_MEMORY_LIMIT:
            problems.append(f"uses {self.shared_memory} bytes of shared memory, above {SHARED_MEMORY_LIMIT}")
        if self.registers * self.threads > REGISTER_FILE:
            problems.append(
                f"uses {self.registers} registers x {self.threads} threads, above {REGISTER_FILE}"
            )
        if needs_tensor_cores and not self.hgmma:
            problems.append("has no HGMMA instruction")
        if needs_tensor_cores and self.loop:
            for unit in ("special", "issue"):
                cycles = getattr(self.loop, unit)
                if cycles > _MOST_CYCLES_FOR_A_TENSOR_CYCLE * self.loop.tensor:
                    problems.append(
                        f"its main loop takes {cycles} {unit} cycles for {self.loop.tensor} of tensor cores"
                    )
        return problems


def compile_sm90(case: Sm90Case) -> Any:
    """Compile one case; returns Triton's CompiledKernel, whose `asm` holds `ttgir`, `ptx` and `cubin`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction):  # autotune and heuristics wrap the function
        kernel = kernel.fn
    names = kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in case.divisible_by_16
    }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source_type = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_type = GluonASTSource
    source = source_type(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(case.options))


def resources(compiled: Any) -> Resources:
    """Read registers, memory and instruction mix of a compiled kernel from its cubin."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = cuobjdump("--dump-resource-usage", cubin)
        sass = cuobjdump("--dump-sass", cubin)
    threads = re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])
    assert threads is not None, "Triton writes the block size into its PTX"

    def amount(key: str) -> int:
        return int(re.findall(rf"{key}:(\d+)", usage)[0])

    def count(instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", sass))

    return Resources(
        registers=amount("REG"),
        stack=amount("STACK"),
        shared_memory=compiled.metadata.shared,
        threads=int(threads[1]),
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        tma_loads=count("UTMALDG"),
        tma_stores=count("UTMASTG") + count("UTMAREDG"),
        spill_loads=count("LDL"),
        spill_stores=count("STL"),
        loop=main_loop(sass),
    )


def cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
