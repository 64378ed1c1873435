# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""The router in Triton: softmax, top-k, renormalisation and both losses in two launches, the backward in one.

A row of logits is short, so one pass holds it in registers. Sums over tokens go by blocks to memory and one CTA
adds them up in order: no atomics, and the same bits every time.

Shapes: N tokens, A experts a token, E experts, B blocks of tokens. Kernels: b_x tiles, p_x pointers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = (
    1_024  # of a block of tokens by all experts: 8 a thread, of which about ten copies are live at once
)
_MOST_TOKENS = 64
_SMALLEST_INT = tl.constexpr(-(2**31))


@triton.jit
def _softmax(p_logit, b_token, num_tokens, num_experts, EXPERTS: tl.constexpr):
    """Logits, probabilities and logsumexp of a block of tokens."""
    b_expert = tl.arange(0, EXPERTS)[None, :]
    b_inside = (b_token < num_tokens)[:, None] & (b_expert < num_experts)
    p_here = p_logit + b_token.to(tl.int64)[:, None] * num_experts + b_expert
    b_logit = tl.load(p_here, mask=b_inside, other=-float("inf"))
    b_largest = tl.max(b_logit, 1)
    b_largest = tl.where(b_token < num_tokens, b_largest, 0.0)  # a row of -inf only would give NaN
    b_exp = tl.exp(b_logit - b_largest[:, None])
    b_sum = tl.sum(b_exp, 1)
    b_sum = tl.where(b_token < num_tokens, b_sum, 1.0)
    return b_logit, b_exp / b_sum[:, None], b_largest + tl.log(b_sum)


@triton.jit
def moe_router_fwd_kernel(
    p_logit, p_weight, p_expert, p_probability, p_count, p_square, num_tokens, num_experts,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Weights and experts of a block of tokens; its sums of probabilities, choices and logsumexp²."""
    block = tl.program_id(0)
    b_token = block * TOKENS + tl.arange(0, TOKENS)
    b_expert, b_k = tl.arange(0, EXPERTS), tl.arange(0, PADDED_K)[None, :]
    b_logit, b_probability, b_logsumexp = _softmax(p_logit, b_token, num_tokens, num_experts, EXPERTS)
    # Integers in the order of the floats (-0 made 0), so that what was chosen can be put below even -inf.
    b_bits = (b_logit + 0.0).to(tl.int32, bitcast=True)
    b_key = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_key = tl.where((b_expert < num_experts)[None, :], b_key, _SMALLEST_INT)
    b_top = tl.full((TOKENS, PADDED_K), -float("inf"), tl.float32)
    b_chosen = tl.zeros((TOKENS, PADDED_K), tl.int32)
    b_hits = tl.zeros((TOKENS, EXPERTS), tl.int32)
    for k in tl.static_range(TOP_K):
        b_best = tl.argmax(b_key, 1, tie_break_left=True)
        b_hit = b_expert[None, :] == b_best[:, None]
        b_value = tl.sum(tl.where(b_hit, b_logit, 0.0), 1)
        b_top = tl.where(b_k == k, b_value[:, None], b_top)
        b_chosen = tl.where(b_k == k, b_best[:, None], b_chosen)
        b_hits += b_hit.to(tl.int32)
        b_key = tl.where(b_hit, _SMALLEST_INT, b_key)
    b_here = (b_token < num_tokens)[:, None]
    b_exp = tl.where(b_here, tl.exp(b_top - tl.max(b_top, 1)[:, None]), 0.0)
    b_weight = b_exp / tl.where(b_here, tl.sum(b_exp, 1)[:, None], 1.0)
    b_offset = b_token.to(tl.int64)[:, None] * TOP_K + b_k
    tl.store(p_weight + b_offset, b_weight, mask=b_here & (b_k < TOP_K))
    tl.store(p_expert + b_offset, b_chosen, mask=b_here & (b_k < TOP_K))
    tl.store(p_probability + block * EXPERTS + b_expert, tl.sum(tl.where(b_here, b_probability, 0.0), 0))
    tl.store(p_count + block * EXPERTS + b_expert, tl.sum(tl.where(b_here, b_hits, 0), 0))
    b_square = tl.where(b_token < num_tokens, b_logsumexp * b_logsumexp, 0.0)
    tl.store(p_square + block, tl.sum(b_square, 0))


@triton.jit
def moe_router_losses_kernel(
    p_probability, p_count, p_square, p_fraction, p_load_balance, p_z, num_blocks, num_tokens, num_experts,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One CTA adds up the blocks: the fraction of choices that fell on each expert, and the two losses."""
    b_expert = tl.arange(0, EXPERTS)
    b_probability = tl.zeros((EXPERTS,), tl.float32)
    b_count = tl.zeros((EXPERTS,), tl.int32)
    square = 0.0
    for block in range(0, num_blocks, BLOCKS):
        b_block = block + tl.arange(0, BLOCKS)
        b_here = b_block < num_blocks
        b_offset = b_block[:, None] * EXPERTS + b_expert[None, :]
        b_probability += tl.sum(tl.load(p_probability + b_offset, mask=b_here[:, None], other=0.0), 0)
        b_count += tl.sum(tl.load(p_count + b_offset, mask=b_here[:, None], other=0), 0)
        square += tl.sum(tl.load(p_square + b_block, mask=b_here, other=0.0), 0)
    b_fraction = b_count.to(tl.float32) / num_tokens / TOP_K
    tl.store(p_fraction + b_expert, b_fraction, mask=b_expert < num_experts)
    tl.store(p_load_balance, num_experts * tl.sum(b_fraction * (b_probability / num_tokens), 0))
    tl.store(p_z, square / num_tokens)


@triton.jit
def moe_router_bwd_kernel(
    p_logit, p_weight, p_expert, p_fraction, p_dweight, p_dload_balance, p_dz, p_dlogit, num_tokens, num_experts,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of logits from those of the weights and of both losses."""
    b_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    b_expert, b_k = tl.arange(0, EXPERTS)[None, :], tl.arange(0, PADDED_K)[None, :]
    _, b_probability, b_logsumexp = _softmax(p_logit, b_token, num_tokens, num_experts, EXPERTS)
    b_fraction = tl.load(p_fraction + b_expert, mask=b_expert < num_experts, other=0.0)
    load_balance = tl.load(p_dload_balance) * num_experts / num_tokens
    b_mean = tl.sum(b_probability * b_fraction, 1)[:, None]
    b_z = (tl.load(p_dz) * 2.0 / num_tokens * b_logsumexp)[:, None]
    b_dlogit = b_probability * (load_balance * (b_fraction - b_mean) + b_z)

    b_here = (b_token < num_tokens)[:, None] & (b_k < TOP_K)
    b_offset = b_token.to(tl.int64)[:, None] * TOP_K + b_k
    b_weight = tl.load(p_weight + b_offset, mask=b_here, other=0.0)
    b_dweight = tl.load(p_dweight + b_offset, mask=b_here, other=0.0)
    b_dtop = b_weight * (b_dweight - tl.sum(b_weight * b_dweight, 1)[:, None])
    b_chosen = tl.load(p_expert + b_offset, mask=b_here, other=-1)
    for k in tl.static_range(TOP_K):
        b_is_k = b_k == k
        b_one = tl.sum(tl.where(b_is_k, b_chosen, 0), 1)[:, None]
        b_dlogit += tl.where(b_expert == b_one, tl.sum(tl.where(b_is_k, b_dtop, 0.0), 1)[:, None], 0.0)
    p_here = p_dlogit + b_token.to(tl.int64)[:, None] * num_experts + b_expert
    tl.store(p_here, b_dlogit, mask=(b_token < num_tokens)[:, None] & (b_expert < num_experts))


def router_forward(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights (N, A), experts (N, A) int32, load-balance loss, z-loss, and the fraction (E) that the backward needs."""
    num_tokens, num_experts = logits_NE.shape
    weights_NA = logits_NE.new_empty(num_tokens, top_k)
    experts_NA = logits_NE.new_empty(num_tokens, top_k, dtype=torch.int32)
    if num_tokens == 0:
        load_balance, z = logits_NE.new_zeros(()), logits_NE.new_zeros(())
        return weights_NA, experts_NA, load_balance, z, logits_NE.new_zeros(num_experts)
    load_balance, z = logits_NE.new_empty(()), logits_NE.new_empty(())
    fraction_E = logits_NE.new_empty(num_experts)
    sizes = block_sizes(num_experts, top_k)
    num_blocks = triton.cdiv(num_tokens, sizes["TOKENS"])
    probability_BE = logits_NE.new_empty(num_blocks, sizes["EXPERTS"])
    count_BE = torch.empty_like(probability_BE, dtype=torch.int32)
    square_B = logits_NE.new_empty(num_blocks)
    moe_router_fwd_kernel[(num_blocks,)](
        logits_NE, weights_NA, experts_NA, probability_BE, count_BE, square_B, num_tokens, num_experts,
        **sizes,
    )  # fmt: skip
    moe_router_losses_kernel[(1,)](
        probability_BE, count_BE, square_B, fraction_E, load_balance, z, num_blocks, num_tokens, num_experts,
        **loss_block_sizes(num_experts, top_k),
    )  # fmt: skip
    return weights_NA, experts_NA, load_balance, z, fraction_E


def router_backward(
    logits_NE: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    fraction_E: Tensor,
    dweights_NA: Tensor,
    dload_balance: Tensor,
    dz: Tensor,
) -> Tensor:
    """Gradient of the logits."""
    dlogits_NE = logits_NE.new_empty(logits_NE.shape)
    num_tokens, num_experts = logits_NE.shape
    if num_tokens:
        sizes = block_sizes(num_experts, weights_NA.shape[1])
        moe_router_bwd_kernel[(triton.cdiv(num_tokens, sizes["TOKENS"]),)](
            logits_NE, weights_NA, experts_NA, fraction_E, dweights_NA, dload_balance, dz, dlogits_NE,
            num_tokens, num_experts, **sizes,
        )  # fmt: skip
    return dlogits_NE


def block_sizes(num_experts: int, top_k: int) -> dict[str, int]:
    experts = triton.next_power_of_2(num_experts)
    return {
        "TOP_K": top_k,
        "PADDED_K": triton.next_power_of_2(top_k),
        "EXPERTS": experts,
        "TOKENS": min(max(_ELEMENTS // experts, 1), _MOST_TOKENS),
    }


def loss_block_sizes(num_experts: int, top_k: int) -> dict[str, int]:
    experts = triton.next_power_of_2(num_experts)
    return {"TOP_K": top_k, "EXPERTS": experts, "BLOCKS": max(4_096 // experts, 1)}
