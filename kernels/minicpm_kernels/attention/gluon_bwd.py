# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""Attention backward for Hopper in Gluon: loads and arithmetic in warps of their own.

The formulas are in attention_triton_bwd.py. A CTA takes a tile of 128 keys of one key head through the queries that
see it, of all heads that the key head serves. A producer brings keys and values once, then queries and dO in blocks of
64, all by TMA. Two consumers, a warpgroup of 64 keys each, hold dK and dV, and scores as keys by queries: P and dS so
lie in registers as the left operands of dV and dK. An iteration of their loop is a pair of blocks, so that matmuls of
one block run beside the exponentials of the other, and the matmuls of one consumer beside the exponentials of the
other in any case.

dQ needs the dS of both consumers, which they therefore lay in shared memory, where dS of the pair's first block is
read by the first consumer and that of the second by the second. Each makes its dQ at the start of the next iteration,
when the other has mostly caught up, and adds it to a float32 sum in memory by TMA. The order of these additions is not
fixed. Where that is not wanted, or registers do not allow it (head dim 128), `attention_bwd_dq_kernel` makes dQ.

| barrier | arrivals a phase | completes when |
|---|---|---|
| kv_full | 1 and the bytes | the tile's keys and values have landed |
| full [stage] | 1 and the bytes | a block of queries, dO, log-sum-exp and delta has landed |
| empty [stage] | 2 | both consumers have used it |
| shared [consumer] | 2 | both have written the dS that this consumer makes dQ of |
| taken [consumer] | 1 | it has done so, and the memory may be written again |

Legend: N tokens, H query heads, K key heads, C head dim, S tokens rounded up, R = H·S rows; b_x tiles in registers, s_x
in shared memory, p_x pointers, t_x TMA descriptors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor as TritonDescriptor

from minicpm_kernels.attention.gluon import (
    LOG2_E,
    ROWS,
    arrive,
    barriers,
    gluon_descriptor,
    gluon_unsupported_reason,
)
from minicpm_kernels.attention.schedule import descriptor
from minicpm_kernels.attention.triton_bwd import prepare_backward, separate_dq

CONSUMERS = gl.constexpr(2)
BLOCK_K = int(CONSUMERS.value * ROWS.value)
STAGES = 4
# Of a thread of a consumer; the producer's warps keep 24.
REGISTERS = 240
INTEGER_ARGUMENTS = ("num_tokens", "num_slots", "num_kv_heads", "num_tiles", "heads_per_section", "group")


def gluon_backward_unsupported_reason(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernel does not serve such tensors, as a clause; empty when it does."""
    from triton._C.libtriton import gluon_ir

    unsupported_reason = gluon_unsupported_reason(head_dim, dtype, device)
    if not unsupported_reason and not hasattr(gluon_ir.GluonOpBuilder, "create_async_tma_reduce"):
        return f"Triton {triton.__version__} has no create_async_tma_reduce"
    return unsupported_reason


def adds_dq(head_dim: int, deterministic: bool) -> bool:
    """Whether dQ is added up by the kernel that makes dK and dV."""
    return not deterministic and head_dim == 64


@_core.builtin
def _tma_add(t_sum, coordinates, s_tile, _semantic=None) -> None:
    """Add a tile in shared memory to memory: Gluon's builder has this instruction, its language no name for it."""
    from triton._C.libtriton import ir

    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD,
        t_sum.handle,
        _semantic._convert_to_ir_values(coordinates, require_i64=False),
        s_tile.handle,
    )


@gluon.jit
def _head_and_tile(num_heads, num_tiles, heads_per_section):
    """As `attention_schedule.head_and_tile`: first tiles of long documents have the most queries and start first."""
    cta = gl.program_id(0)
    ctas_per_section = num_tiles * heads_per_section
    section = cta // ctas_per_section
    heads_here = gl.minimum(heads_per_section, num_heads - section * heads_per_section)
    within = cta - section * ctas_per_section
    return section * heads_per_section + within % heads_here, within // heads_here


@gluon.jit
def _producer_partition(
    t_q, t_k, t_v, t_d_out, t_lse_log2, t_delta, s_q, s_k, s_v, s_d_out, s_lse_log2, s_delta, kv_full, full, empty,
    first_key, kv_head, group, num_pairs,
):  # fmt: skip
    STAGES: gl.constexpr = s_q.shape[0]
    HEAD_DIM: gl.constexpr = s_q.shape[2]
    column = kv_head * HEAD_DIM
    landed = kv_full.index(0)
    mbarrier.expect(landed, CONSUMERS * (t_k.block_type.nbytes + t_v.block_type.nbytes))
    for i in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(t_k, [first_key + i * ROWS, column], landed, s_k.index(i))
        tma.async_copy_global_to_shared(t_v, [first_key + i * ROWS, column], landed, s_v.index(i))
    position = 0
    for head in range(kv_head * group, kv_head * group + group):
        query = first_key
        for _ in range(2 * num_pairs):
            stage = position % STAGES
            landed = full.index(stage)
            mbarrier.wait(empty.index(stage), (position // STAGES & 1) ^ 1)
            mbarrier.expect(landed, 2 * t_q.block_type.nbytes + 2 * t_delta.block_type.nbytes)
            tma.async_copy_global_to_shared(t_q, [query, head * HEAD_DIM], landed, s_q.index(stage))
            tma.async_copy_global_to_shared(t_lse_log2, [head, query], landed, s_lse_log2.index(stage))
            tma.async_copy_global_to_shared(t_d_out, [query, head * HEAD_DIM], landed, s_d_out.index(stage))
            tma.async_copy_global_to_shared(t_delta, [head, query], landed, s_delta.index(stage))
            position += 1
            query += ROWS


@gluon.jit
def _times_transposed(a, s_b, layout: gl.constexpr):
    """Issue a·bᵀ, of 64 keys and 64 queries."""
    zero = gl.zeros([ROWS, ROWS], gl.float32, layout)
    return hopper.warpgroup_mma(a, s_b.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _left(b_tile, like):
    """A tile of 64 keys and 64 queries, as it lies, as the left operand of a matmul."""
    layout: gl.constexpr = gl.DotOperandLayout(0, like.type.layout, 2)
    return gl.convert_layout(b_tile, layout, assert_trivial=True)


@gluon.jit
def _weights(
    b_score, s_lse_log2, query, middle, tail, b_key, b_end_query, scale_log2, ALWAYS_MASK: gl.constexpr
):
    """P; from `middle` to `tail` every query sees every key."""
    layout: gl.constexpr = b_score.type.layout
    b_lse_log2 = s_lse_log2.load(layout)
    if ALWAYS_MASK or ((query < middle) | (query > tail)):
        # Bits 1 and 2 of a column are the thread's, the others the register's. Apart, the compiler compares with
        # constants; together, it would hold the 16 columns of a thread in registers for the whole loop.
        b_column = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, layout)), 0)
        b_of_thread, b_of_register = query + (b_column & 6), b_column & ~6
        # Between the key and the end of its queries, in one comparison.
        b_distance = b_of_register - (gl.expand_dims(b_key, 1) - b_of_thread)
        b_visible = b_distance.to(gl.uint32) < gl.expand_dims(b_end_query - b_key, 1).to(gl.uint32)
        b_score = gl.where(b_visible, b_score, -float("inf"))
    return gl.exp2(b_score * scale_log2 - b_lse_log2)


@gluon.jit
def _d_score(b_weight, b_d_weight, s_delta, dtype: gl.constexpr):
    return (b_weight * (b_d_weight - s_delta.load(b_weight.type.layout))).to(dtype)


@gluon.jit
def _share(b_d_score, s_d_score, shared, taken, pair):
    """Lay this consumer's dS where the one that makes dQ of it can read it."""
    mbarrier.wait(taken, pair & 1)
    s_d_score.store(b_d_score)
    hopper.fence_async_shared()
    arrive(shared)


@gluon.jit
def _dq_product(s_d_score, s_k, INDEX: gl.constexpr, layout: gl.constexpr):
    """Issue the dQ of 64 queries: both consumers' dS, transposed, times their keys."""
    zero = gl.zeros([ROWS, ROWS], gl.float32, layout)
    s_left = s_d_score.index(CONSUMERS * INDEX).permute((1, 0))
    dq = hopper.warpgroup_mma(s_left, s_k.index(0), zero, use_acc=False, is_async=True)
    s_left = s_d_score.index(CONSUMERS * INDEX + 1).permute((1, 0))
    return hopper.warpgroup_mma(s_left, s_k.index(1), dq, is_async=True)


@gluon.jit
def _add_dq(t_dq_sum, s_dq, b_dq, row, is_dq):
    """Add a dQ to the sum in memory, in the order of threads.

    In a 64x64 accumulator, rows are 4 warps x 2 x 8 lanes and columns 8 x 4 lanes x 2: what a thread holds lies
    scattered, and its stores would sync others in the same banks. So four elements of a thread go side by side.
    """
    b_parts = gl.permute(gl.reshape(b_dq, [4, 2, 8, 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    tma.store_wait(0)
    s_dq.store(gl.reshape(b_parts, [ROWS, ROWS]))
    hopper.fence_async_shared()
    if is_dq:
        _tma_add(t_dq_sum, [row, 0], s_dq)


@gluon.jit
def _consumer_partition(attend, INDEX: gl.constexpr, ADD_DQ: gl.constexpr):
    (
        t_dk, t_dv, t_dq_sum, p_end_query, s_q, s_k, s_v, s_d_out, s_lse_log2, s_delta, s_d_score, s_dq,
        kv_full, full, empty, shared, taken,
        first_key, kv_head, group, num_pairs, num_tokens, num_slots, scale, scale_log2,
    ) = attend  # fmt: skip
    STAGES: gl.constexpr = s_q.shape[0]
    HEAD_DIM: gl.constexpr = s_q.shape[2]
    # At head dim 64 there are registers to hold K and V, to have a consumer's own matmuls run beside its exponentials
    # and to branch around the mask, which at head dim 128 is little beside the matmuls.
    AHEAD: gl.constexpr = HEAD_DIM == 64
    dtype: gl.constexpr = s_q.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])

    my_key = first_key + INDEX * ROWS
    b_key = my_key + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    # Keys beyond the last token, or of no document, are seen by no query.
    b_end_query = gl.maximum(gl.load(p_end_query + gl.minimum(b_key, num_tokens - 1)), b_key)
    middle = my_key + ROWS
    tail = gl.load(p_end_query + gl.minimum(my_key, num_tokens - 1)) - ROWS

    mbarrier.wait(kv_full.index(0), 0)
    if AHEAD:
        key_layout: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
        key, value = s_k.index(INDEX).load(key_layout), s_v.index(INDEX).load(key_layout)
    b_dk = gl.zeros([ROWS, HEAD_DIM], gl.float32, sum_layout)
    b_dv = gl.zeros([ROWS, HEAD_DIM], gl.float32, sum_layout)
    # One loop for all heads: nested loops would hold more registers.
    total = group * num_pairs
    gl.assume(total > 0)  # or the compiler makes a second way past the loop, with copies of all registers
    stop = first_key + num_pairs * 2 * ROWS
    query = first_key
    head_row = kv_head * group * num_slots
    dq_row = 0
    for pair in range(total):
        # Zero, but the compiler does not know: it would compute operands' addresses before the loop and hold them.
        hidden = pair >> 30
        stage = 2 * pair % STAGES + hidden
        phase = 2 * pair // STAGES & 1
        if not AHEAD:
            key, value = s_k.index(INDEX + hidden), s_v.index(INDEX + hidden)
        if ADD_DQ:
            # Of the pair before. In the first iteration it is made of whatever lies there, and goes nowhere.
            mbarrier.wait(shared.index(INDEX), (pair & 1) ^ 1, pred=pair > 0)
            dq = _dq_product(s_d_score, s_k, INDEX, score_layout)
        mbarrier.wait(full.index(stage), phase)
        score_0 = _times_transposed(key, s_q.index(stage), score_layout)
        if ADD_DQ:
            b_dq = hopper.warpgroup_mma_wait(1, deps=[dq])
            arrive(taken.index(INDEX))
            _add_dq(t_dq_sum, s_dq.index(INDEX), b_dq, dq_row, pair > 0)
            dq_row = head_row + query + INDEX * ROWS
        if AHEAD:
            d_weight_0 = _times_transposed(value, s_d_out.index(stage), score_layout)
        mbarrier.wait(full.index(stage + 1), phase)
        if AHEAD:
            score_1 = _times_transposed(key, s_q.index(stage + 1), score_layout)

        # Matmuls end in the order in which they were issued: a wait names how many may still run.
        b_score = hopper.warpgroup_mma_wait(2 * AHEAD, deps=[score_0])
        b_weight = _weights(
            b_score, s_lse_log2.index(stage), query, middle, tail, b_key, b_end_query, scale_log2, not AHEAD
        )
        dv = hopper.warpgroup_mma(_left(b_weight.to(dtype), b_dv), s_d_out.index(stage), b_dv, is_async=True)
        if not AHEAD:
            d_weight_0 = _times_transposed(value, s_d_out.index(stage), score_layout)
        b_d_weight = hopper.warpgroup_mma_wait(2 * AHEAD, deps=[d_weight_0])
        b_d_score = _d_score(b_weight, b_d_weight, s_delta.index(stage), dtype)
        dk = hopper.warpgroup_mma(_left(b_d_score, b_dk), s_q.index(stage), b_dk, is_async=True)
        if AHEAD:
            d_weight_1 = _times_transposed(value, s_d_out.index(stage + 1), score_layout)
            if ADD_DQ:
                _share(b_d_score, s_d_score.index(INDEX), shared.index(0), taken.index(0), pair)
            b_score = hopper.warpgroup_mma_wait(3, deps=[score_1])
        else:
            score_1 = _times_transposed(key, s_q.index(stage + 1), score_layout)
            b_score = hopper.warpgroup_mma_wait(0, deps=[score_1])

        b_weight = _weights(
            b_score, s_lse_log2.index(stage + 1), query + ROWS, middle, tail, b_key, b_end_query, scale_log2, not AHEAD
        )  # fmt: skip
        dv = hopper.warpgroup_mma(
            _left(b_weight.to(dtype), b_dv), s_d_out.index(stage + 1), dv, is_async=True
        )
        if not AHEAD:
            d_weight_1 = _times_transposed(value, s_d_out.index(stage + 1), score_layout)
        b_d_weight = hopper.warpgroup_mma_wait(AHEAD, deps=[d_weight_1])
        if not ADD_DQ:
            # TMA overwrites the log-sum-exp and delta that ordinary loads have read; with ADD_DQ, `_share` has fenced.
            hopper.fence_async_shared()
        arrive(empty.index(stage))
        b_d_score = _d_score(b_weight, b_d_weight, s_delta.index(stage + 1), dtype)
        dk = hopper.warpgroup_mma(_left(b_d_score, b_dk), s_q.index(stage + 1), dk, is_async=True)
        if ADD_DQ:
            _share(b_d_score, s_d_score.index(CONSUMERS + INDEX), shared.index(1), taken.index(1), pair)
        # No matmul runs on into the next iteration: ptxas would take all of them one by one.
        b_dk, b_dv = hopper.warpgroup_mma_wait(0, deps=[dk, dv])
        if not ADD_DQ:
            hopper.fence_async_shared()
        arrive(empty.index(stage + 1))
        query += 2 * ROWS
        head_row = gl.where(query == stop, head_row + num_slots, head_row)
        query = gl.where(query == stop, first_key, query)

    if ADD_DQ:
        mbarrier.wait(shared.index(INDEX), (total & 1) ^ 1)
        b_dq = hopper.warpgroup_mma_wait(0, deps=[_dq_product(s_d_score, s_k, INDEX, score_layout)])
        _add_dq(t_dq_sum, s_dq.index(INDEX), b_dq, dq_row, True)
    # In the place of V: only this consumer has read this part, and does no more.
    s_out = s_v.index(INDEX)
    s_out.store(b_dv.to(dtype))
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(t_dv, [my_key, kv_head * HEAD_DIM], s_out)
    tma.store_wait(0)
    s_out.store((b_dk * scale).to(dtype))
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(t_dk, [my_key, kv_head * HEAD_DIM], s_out)
    tma.store_wait(0)


# One compiled kernel for all sizes: the one that `sm90_cases` lists and tests judge.
@gluon.jit(do_not_specialize=INTEGER_ARGUMENTS)
def attention_gluon_bwd_kernel(
    t_q, t_k, t_v, t_d_out, t_dk, t_dv, t_dq_sum, t_lse_log2, t_delta, p_end_query,
    num_tokens, num_slots, num_kv_heads, num_tiles, heads_per_section, group, scale, scale_log2,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, ADD_DQ: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head, over all query heads that it serves; with ADD_DQ, its part of
    dQ."""
    dtype: gl.constexpr = t_q.dtype
    s_k = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], t_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], t_v.layout)
    s_q = gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], t_q.layout)
    s_d_out = gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], t_d_out.layout)
    s_lse_log2 = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], t_lse_log2.layout)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], t_delta.layout)
    # By block of the pair, then by consumer. What is not used takes no memory.
    s_d_score = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, ROWS, ROWS], t_q.layout)
    s_dq = gl.allocate_shared_memory(gl.float32, [CONSUMERS, ROWS, ROWS], t_dq_sum.layout)
    kv_full, full, empty = barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    shared, taken = full, empty
    if ADD_DQ:
        shared, taken = barriers(CONSUMERS, CONSUMERS), barriers(CONSUMERS, 1)

    kv_head, tile = _head_and_tile(num_kv_heads, num_tiles, heads_per_section)
    first_key = tile * (CONSUMERS * ROWS)
    end = gl.load(p_end_query + gl.minimum(first_key + CONSUMERS * ROWS, num_tokens) - 1)
    num_pairs = gl.maximum(gl.cdiv(end - first_key, 2 * ROWS), 1)  # keys of no document: one pair, all masked
    attend = (
        t_dk, t_dv, t_dq_sum, p_end_query, s_q, s_k, s_v, s_d_out, s_lse_log2, s_delta, s_d_score, s_dq,
        kv_full, full, empty, shared, taken,
        first_key, kv_head, group, num_pairs, num_tokens, num_slots, scale, scale_log2,
    )  # fmt: skip
    load = (
        t_q, t_k, t_v, t_d_out, t_lse_log2, t_delta, s_q, s_k, s_v, s_d_out, s_lse_log2, s_delta,
        kv_full, full, empty, first_key, kv_head, group, num_pairs,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer_partition, (attend, gl.constexpr(0), gl.constexpr(ADD_DQ))),
            (_consumer_partition, (attend, gl.constexpr(1), gl.constexpr(ADD_DQ))),
            (_producer_partition, load),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@triton.jit(do_not_specialize=["num_slots"])
def attention_gluon_bwd_dq_kernel(t_dq_sum, t_dq, num_slots, scale):
    """Scale and round dQ of 64 queries of one head, and bring it from the order of threads to its own."""
    block, head = tl.program_id(0), tl.program_id(1)
    b_parts = tl.reshape(t_dq_sum.load([head * num_slots + block * 64, 0]), [8, 4, 8, 4, 2, 2])
    b_dq = tl.reshape(tl.permute(b_parts, (1, 4, 2, 0, 3, 5)), [64, 64])
    t_dq.store([block * 64, head * 64], (b_dq * scale).to(t_dq.dtype))


def attention_gluon_backward(
    d_out_NHC: Tensor,
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    out_NHC: Tensor,
    lse_HN: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (N, H, C), (N, K, C), (N, K, C) in the type of the inputs. Nothing waits for the device."""
    inputs, gradients, plan = prepare_backward(
        d_out_NHC, q_NHC, k_NKC, v_NKC, out_NHC, lse_HN, cu_seqlens, max_seqlen=max_seqlen, window=window
    )  # fmt: skip
    if plan is None:
        return gradients
    q_NHC, k_NKC, v_NKC, d_out_NHC = inputs
    dq_NHC, dk_NKC, dv_NKC = gradients
    num_tokens, num_heads, head_dim = q_NHC.shape
    num_kv_heads = k_NKC.shape[1]
    group = num_heads // num_kv_heads
    add_dq = adds_dq(head_dim, deterministic)
    num_tiles = triton.cdiv(num_tokens, BLOCK_K)
    num_slots = num_tiles * BLOCK_K
    # Whole tiles for each head. Without add_dq nothing touches it, but an argument must be there.
    dq_sum_RC = torch.zeros(
        (num_heads * num_slots if add_dq else 64, 64), dtype=torch.float32, device=q_NHC.device
    )
    attention_gluon_bwd_kernel[(num_tiles * num_kv_heads,)](
        *(gluon_descriptor(x, ROWS.value) for x in (q_NHC, k_NKC, v_NKC, d_out_NHC, dk_NKC, dv_NKC)),
        _float32_descriptor(dq_sum_RC, 64),
        _float32_descriptor(plan.lse_log2_HS, 1),
        _float32_descriptor(plan.delta_HS, 1),
        plan.end_query_N,
        num_tokens,
        num_slots,
        num_kv_heads,
        num_tiles,
        plan.section // group,
        group,
        scale,
        scale * LOG2_E,
        HEAD_DIM=head_dim,
        STAGES=STAGES,
        REGISTERS=REGISTERS,
        ADD_DQ=add_dq,
        num_warps=4,
    )
    if add_dq:
        attention_gluon_bwd_dq_kernel[(triton.cdiv(num_tokens, 64), num_heads)](
            TritonDescriptor(dq_sum_RC, list(dq_sum_RC.shape), [64, 1], [64, 64]),
            descriptor(dq_NHC, 64),
            num_slots,
            scale,
            num_warps=4,
        )
        return dq_NHC, dk_NKC, dv_NKC

    separate_dq(q_NHC, k_NKC, v_NKC, d_out_NHC, dq_NHC, plan, scale=scale)
    return dq_NHC, dk_NKC, dv_NKC


def _float32_descriptor(x_RC: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of 64 columns that lie in shared memory row after row."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(x_RC, list(x_RC.shape), [x_RC.stride(0), 1], [rows, 64], layout)
