"""Every kernel compiled for sm_90 without a GPU: limits kept, the published table true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from minicpm_kernels_testing.sass import LoopLoad, main_loop
from minicpm_kernels_testing.sm90_compile import Resources

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
IDLE = {
    "registers": 32,
    "stack": 0,
    "shared_memory": 0,
    "threads": 128,
    "hgmma": 4,
    "hmma": 0,
    "tma_loads": 0,
    "tma_stores": 0,
    "spill_loads": 0,
    "spill_stores": 0,
    "loop": None,
}
# Two nested loops, of which the inner one multiplies; a wait in it spins out of line, as ptxas lays it out.
SASS = """
    /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
    /*0010*/                   MUFU.RCP R0, R0 ;           /* 0x0000000000007308 */
    /*0020*/                   SYNCS.PHASECHK P0, [R2] ;   /* 0x0000000000000000 */
    /*0030*/              @!P0 BRA 0x00b0 ;                /* 0x0000000000000000 */
    /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0 */
    /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, R4, gdesc[UR4], R88, gsb0 ; /* 0x0 */
    /*0060*/                   MUFU.EX2 R5, R5 ;           /* 0x0000000000000000 */
    /*0070*/               @P1 BRA 0x0020 ;                /* 0x0000000000000000 */
    /*0080*/                   FADD R5, R5, 1 ;            /* 0x0000000000000000 */
    /*0090*/               @P2 BRA 0x0010 ;                /* 0x0000000000000000 */
    /*00a0*/                   EXIT ;                      /* 0x0000000000000000 */
    /*00b0*/                   SYNCS.PHASECHK P0, [R2] ;   /* 0x0000000000000000 */
    /*00c0*/              @!P0 BRA 0x00b0 ;                /* 0x0000000000000000 */
    /*00d0*/                   BRA 0x0040 ;                /* 0x0000000000000000 */
"""


@pytest.mark.slow(seconds=30)
def test_table_is_current_and_limits_hold():
    import triton

    if triton.__version__ != "3.6.0":
        pytest.skip("the table is of Triton 3.6.0")
    command = [sys.executable, str(BENCHMARKS / "sm90.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_row_addresses_of_contiguous_tensors_are_64_bit(run_where_triton_compiles):
    """More than 2^31 elements: RMSNorm multiplies rows by the width, and must do so in int64."""
    ttir = run_where_triton_compiles(
        "from minicpm_kernels_testing.cases import rms_norm\n"
        "from minicpm_kernels_testing.sm90_compile import compile_sm90\n"
        "for case in rms_norm.cases(): print(compile_sm90(case).asm['ttir'])"
    )
    offsets = re.findall(r"tt\.addptr .*tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(i\d+)>", ttir)
    assert len(offsets) > 40
    assert set(offsets) == {"i64"}


@pytest.mark.parametrize(
    ("used", "problem"),
    [
        ({"stack": 8}, "uses 8 bytes of stack"),
        ({"spill_stores": 2}, "spills (0 local loads, 2 local stores)"),
        ({"shared_memory": 232_449}, "uses 232449 bytes of shared memory, above 232448"),
        ({"registers": 129, "threads": 512}, "uses 129 registers x 512 threads, above 65536"),
        ({"hgmma": 0}, "has no HGMMA instruction"),
        (
            {"loop": LoopLoad(tensor=512, special=100, issue=641)},
            "its main loop takes 641 issue cycles for 512 of tensor cores",
        ),
    ],
    ids=str,
)
def test_broken_limits_are_named(used, problem):
    assert Resources(**IDLE | used).broken_limits(needs_tensor_cores=True) == [problem]
    assert Resources(**IDLE).broken_limits(needs_tensor_cores=True) == []


@pytest.mark.parametrize(
    ("used", "blocks", "occupancy"),
    [
        ({}, 16, 1.0),  # threads: 2048 of an SM
        ({"registers": 221}, 2, 0.125),  # registers: 224 x 128 after rounding up
        ({"registers": 255, "threads": 256}, 1, 0.125),
        ({"shared_memory": 66_560}, 3, 0.1875),
        ({"threads": 32}, 32, 0.5),  # blocks: 32 of an SM
    ],
    ids=str,
)
def test_occupancy(used, blocks, occupancy):
    resources = Resources(**IDLE | used)
    assert resources.blocks_per_sm == blocks
    assert resources.occupancy == occupancy


def test_main_loop_is_the_inner_one_with_the_wait_it_holds():
    assert main_loop(SASS) == LoopLoad(tensor=64 + 32, special=8, issue=9)


def test_no_main_loop_without_products():
    assert main_loop(SASS.replace("HGMMA", "FFMA")) is None
