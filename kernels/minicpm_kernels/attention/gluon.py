# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201
"""What the attention kernels in Gluon share: whom they serve, barriers, tiles in shared memory."""

import os
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minicpm_kernels.backend import GLUON_VARIABLE, interpreter_enabled

LOG2_E = 1.4426950408889634
# Rows of a consumer: those of one warpgroup's matmul.
ROWS = gl.constexpr(64)
# Of queries, keys, values and output in shared memory.
TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# Waits for all warps of a partition. Triton 3.7 calls it by another name.
sync: Any = getattr(gl, "thread_barrier", getattr(gl, "barrier", None))


@gluon.jit
def arrive(barrier):
    """Say that the partition is done with something: all of its warps are, not only the one that says so."""
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """As many mbarriers, each of so many arrivals a phase."""
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), count=arrivals)
    return made


def gluon_unsupported_reason(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernel does not serve such tensors, as a clause; empty when it does."""
    if os.environ.get(GLUON_VARIABLE) == "0":
        return f"{GLUON_VARIABLE}=0 rules Gluon kernels out"
    if interpreter_enabled():
        return "Triton's interpreter does not run Gluon"
    if missing := _missing_from_gluon():
        return f"Triton {triton.__version__} has no {missing}"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0)):
        return f"the Gluon kernel is for compute capability 9.0, not for {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the Gluon kernel serves bfloat16 and float16, not {dtype}"
    if head_dim not in (64, 128):
        return f"the Gluon kernel serves head dims 64 and 128, not {head_dim}"
    return ""


def _missing_from_gluon() -> str:
    """The first thing that the kernel uses and this Triton's Gluon, which is experimental, does not have."""
    if sync is None:
        return "barrier of a partition in Gluon"
    used = {
        gl: "warp_specialize allocate_shared_memory inline_asm_elementwise num_warps atomic_add",
        hopper: "warpgroup_mma warpgroup_mma_wait fence_async_shared",
        mbarrier: "init expect arrive wait MBarrierLayout",
        tma: "async_copy_global_to_shared async_copy_shared_to_global store_wait",
    }
    for module, names in used.items():
        for name in names.split():
            if not hasattr(module, name):
                return f"{module.__name__}.{name}"
    return ""


def gluon_descriptor(x_NHC: Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of (N, H·D) in blocks of ``rows`` tokens of one head; rows outside N read as zero."""
    num_tokens, heads, head_dim = x_NHC.shape
    return TensorDescriptor(
        x_NHC, [num_tokens, heads * head_dim], [x_NHC.stride(0), 1], [rows, head_dim], TILE_LAYOUT
    )
