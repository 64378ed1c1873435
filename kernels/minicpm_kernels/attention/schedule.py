# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201
"""What the attention kernels share: which keys belong to which query, the order of work, TMA descriptors.

Tiles are cut from the packed tokens at fixed steps, whatever document they hold, so the grid is known
without asking the device, and tiny documents share a tile. What a tile must read it learns from two
integers per token, made on the device in one small launch: ``first_key`` (start of the token's document, or
of its window) and ``end_query`` (the queries that see this key end before it). Both never fall from token
to token, so the first and the last token of a tile bound its loop: no block of another document is loaded
unless a document starts or ends inside the tile.

Legend: b_x tiles, p_x pointers, t_x TMA descriptors.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Keys and values of the heads that are worked on at one time should stay in the L2 cache (50 MB on Hopper)
# beside everything else that passes through it. A choice by reasoning: it has not been tuned on a card yet.
_L2_BYTES_FOR_KEYS_AND_VALUES = 24 * 2**20

_BOUNDS_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows of a query tile and of a key tile, and how the compiler shall build the kernel."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    # Registers of a thread, where two CTAs on one SM need a cap that the compiler would
    # just miss.
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Launch options in Triton's names."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


@triton.jit
def attention_bounds_kernel(
    p_cu_seqlens, p_first_key, p_end_query, num_documents, num_tokens, window, num_steps, BLOCK: tl.constexpr
):
    """Find each token's document by bisection; write the first key that it sees and the end of its
    queries."""
    b_token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_low = tl.zeros((BLOCK,), tl.int32)
    b_high = tl.zeros((BLOCK,), tl.int32) + num_documents
    # Finds the last document that starts at or before the token, which therefore is not an empty one.
    for _ in range(num_steps):
        b_middle = (b_low + b_high) // 2
        b_starts_before = tl.load(p_cu_seqlens + b_middle) <= b_token
        b_low = tl.where(b_starts_before, b_middle, b_low)
        b_high = tl.where(b_starts_before, b_high, b_middle)
    b_start = tl.load(p_cu_seqlens + b_low)
    b_end = tl.load(p_cu_seqlens + b_low + 1)
    # The host does not look at cu_seqlens: whatever they hold, a token sees itself, nothing later, nothing outside.
    b_first_key = tl.maximum(tl.maximum(b_start, b_token - window + 1), 0)
    b_end_query = tl.minimum(tl.minimum(b_end, b_token + window), num_tokens)
    tl.store(p_first_key + b_token, tl.minimum(b_first_key, b_token), mask=b_token < num_tokens)
    tl.store(p_end_query + b_token, tl.maximum(b_end_query, b_token + 1), mask=b_token < num_tokens)


@triton.jit
def head_and_tile(num_heads, num_tiles, heads_per_section):
    """Which head and which tile this CTA works on.

    CTAs start in the order of their number. Sections of heads come one after another, so that their
    keys and values stay in the L2 cache; within a section all heads do one tile, then all heads the next
    tile.
    """
    cta = tl.program_id(0)
    ctas_per_section = num_tiles * heads_per_section
    section = cta // ctas_per_section
    heads_here = tl.minimum(heads_per_section, num_heads - section * heads_per_section)
    within = cta - section * ctas_per_section
    return section * heads_per_section + within % heads_here, within // heads_here


def attention_bounds(cu_seqlens: Tensor, num_tokens: int, window: int | None) -> tuple[Tensor, Tensor]:
    """First key and end of queries, int32 (N,) each, of every token."""
    first_key_N = torch.empty(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    end_query_N = torch.empty_like(first_key_N)
    num_documents = cu_seqlens.shape[0] - 1
    attention_bounds_kernel[(triton.cdiv(num_tokens, _BOUNDS_BLOCK),)](
        cu_seqlens.contiguous(),
        first_key_N,
        end_query_N,
        num_documents,
        num_tokens,
        num_tokens if window is None else min(window, num_tokens),
        num_documents.bit_length(),
        BLOCK=_BOUNDS_BLOCK,
    )
    return first_key_N, end_query_N


def heads_per_section(
    num_kv_heads: int, group: int, max_seqlen: int, head_dim: int, element_size: int
) -> int:
    """How many query heads are worked on at one time; whole groups, because a group shares keys and
    values."""
    bytes_per_kv_head = max(1, 2 * max_seqlen * head_dim * element_size)
    kv_heads = min(max(1, _L2_BYTES_FOR_KEYS_AND_VALUES // bytes_per_kv_head), num_kv_heads)
    return kv_heads * group


def rows_of_heads(x_NHC: Tensor) -> Tensor:
    """The tensor itself where TMA can read it as (N, H·D) rows, else a copy.

    TMA needs heads side by side, rows apart and at multiples of 16 bytes; slices of a merged projection are
    that already, one row for all tokens (an expanded gradient) is not.
    """
    num_tokens, heads, head_dim = x_NHC.shape
    side_by_side = x_NHC.stride(2) == 1 and (heads == 1 or x_NHC.stride(1) == head_dim)
    side_by_side = side_by_side and x_NHC.stride(0) >= heads * head_dim
    aligned = x_NHC.stride(0) * x_NHC.element_size() % 16 == 0 and x_NHC.data_ptr() % 16 == 0
    # One row may claim any stride; cloning gives it the one that fits.
    return (
        x_NHC
        if num_tokens > 1 and side_by_side and aligned
        else x_NHC.clone(memory_format=torch.contiguous_format)
    )


def descriptor(x_NHC: Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of (N, H·D) in blocks of ``rows`` tokens of one head; rows beyond N read as zero."""
    num_tokens, heads, head_dim = x_NHC.shape
    return TensorDescriptor(x_NHC, [num_tokens, heads * head_dim], [x_NHC.stride(0), 1], [rows, head_dim])
