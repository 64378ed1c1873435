"""Causal attention over packed documents in plain torch: the float32 reference, and the fast path for CPUs.

Legend: N tokens of all documents in one row, H query heads, K key heads, C head dim, L tokens of a document,
G documents of equal length that are computed together.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def attention_reference(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cu_seqlens: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attend in float32 (float64 for float64 inputs), one document after another; differentiable by autograd.

    Returns the output (N, H, C) in that precision and the natural log of the softmax's denominator (H, N).
    Holds every score of a document at once, so it is for checking and for devices without a faster path.
    """
    precise = torch.promote_types(q_NHC.dtype, torch.float32)
    group = q_NHC.shape[1] // k_NKC.shape[1]
    outputs, lses = [], []
    for start, end in _documents(cu_seqlens):
        q_HLC = q_NHC[start:end].to(precise).transpose(0, 1)
        k_HLC, v_HLC = (
            x_NKC[start:end].to(precise).transpose(0, 1).repeat_interleave(group, 0)
            for x_NKC in (k_NKC, v_NKC)
        )
        scores_HLL = scale * (q_HLC @ k_HLC.transpose(1, 2))
        scores_HLL = scores_HLL.masked_fill(~_visible(end - start, window, q_NHC.device), -torch.inf)
        outputs.append((scores_HLL.softmax(-1) @ v_HLC).transpose(0, 1))
        lses.append(scores_HLL.logsumexp(-1))
    if not outputs:
        return q_NHC.to(precise, copy=True), q_NHC.new_empty((q_NHC.shape[1], 0), dtype=precise)
    return torch.cat(outputs), torch.cat(lses, 1)


def attention_reference_backward(
    d_out_NHC: Tensor,
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention_reference`` in the types of the inputs; repeats the forward pass."""
    with torch.enable_grad():
        q_NHC, k_NKC, v_NKC = (x.detach().requires_grad_() for x in (q_NHC, k_NKC, v_NKC))
        out_NHC, _ = attention_reference(q_NHC, k_NKC, v_NKC, cu_seqlens, scale=scale, window=window)
        d_q_NHC, d_k_NKC, d_v_NKC = torch.autograd.grad(
            out_NHC, (q_NHC, k_NKC, v_NKC), d_out_NHC.to(out_NHC.dtype), materialize_grads=True
        )
    return d_q_NHC.contiguous(), d_k_NKC.contiguous(), d_v_NKC.contiguous()


def attention_cpu_forward(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cu_seqlens: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attend with torch's own CPU flash attention, one call for each run of documents of equal length.

    Returns the output (N, H, C) in the inputs' type and the log-sum-exp (H, N) in float32.
    """
    out_NHC = torch.empty(q_NHC.shape, dtype=q_NHC.dtype)
    lse_HN = torch.empty((q_NHC.shape[1], q_NHC.shape[0]), dtype=_lse_dtype(q_NHC))
    for start, length, count in _equal_runs(cu_seqlens):
        q_GHLC, k_GKLC, v_GKLC = (_batch(x, start, length, count) for x in (q_NHC, k_NKC, v_NKC))
        mask = _additive_mask(length, window, q_NHC.dtype)
        # The op behind scaled_dot_product_attention: called directly, because only it returns the log-sum-
        # exp, with which backward need not repeat the forward pass.
        o_GHLC, lse_GHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_GHLC, k_GKLC, v_GKLC, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        _batch(out_NHC, start, length, count).copy_(o_GHLC)
        _batch_lse(lse_HN, start, length, count).copy_(lse_GHL)
    return out_NHC, lse_HN


def attention_cpu_backward(
    d_out_NHC: Tensor,
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    out_NHC: Tensor,
    lse_HN: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention_cpu_forward`` with respect to q, k and v."""
    d_q_NHC, d_k_NKC, d_v_NKC = (torch.empty(x.shape, dtype=x.dtype) for x in (q_NHC, k_NKC, v_NKC))
    for start, length, count in _equal_runs(cu_seqlens):
        d_out_GHLC, q_GHLC, k_GKLC, v_GKLC, out_GHLC = (
            _batch(x, start, length, count) for x in (d_out_NHC, q_NHC, k_NKC, v_NKC, out_NHC)
        )
        lse_GHL = _batch_lse(lse_HN, start, length, count)
        mask = _additive_mask(length, window, q_NHC.dtype)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out_GHLC, q_GHLC, k_GKLC, v_GKLC, out_GHLC, lse_GHL, 0.0, mask is None,
            attn_mask=mask, scale=scale,
        )  # fmt: skip
        for target, gradient in zip((d_q_NHC, d_k_NKC, d_v_NKC), gradients, strict=True):
            _batch(target, start, length, count).copy_(gradient)
    return d_q_NHC, d_k_NKC, d_v_NKC


def _lse_dtype(q_NHC: Tensor) -> torch.dtype:
    return torch.promote_types(q_NHC.dtype, torch.float32)


def _documents(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    """Start and end of every document that has tokens."""
    bounds: Sequence[int] = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if end > start:
            yield start, end


def _equal_runs(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbouring documents of one length, as (start, length, count)."""
    run_start = run_length = count = 0
    for start, end in _documents(cu_seqlens):
        if end - start == run_length:
            count += 1
            continue
        if count:
            yield run_start, run_length, count
        run_start, run_length, count = start, end - start, 1
    if count:
        yield run_start, run_length, count


def _batch(x_NHC: Tensor, start: int, length: int, count: int) -> Tensor:
    """View ``count`` neighbouring documents as a batch: (C, H, L, C)."""
    return x_NHC[start : start + length * count].view(count, length, *x_NHC.shape[1:]).transpose(1, 2)


def _batch_lse(lse_HN: Tensor, start: int, length: int, count: int) -> Tensor:
    """View their log-sum-exps as a batch: (C, H, L)."""
    return lse_HN[:, start : start + length * count].view(-1, count, length).transpose(0, 1)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) booleans: the keys that each query of a document sees."""
    visible_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible_LL if window is None else visible_LL.triu(1 - window)


def _additive_mask(length: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """The mask that torch's CPU op adds to the scores; None where its own causal mask is all that is
    needed."""
    if window is None or window >= length:
        return None
    hidden = ~_visible(length, window, torch.device("cpu"))
    return torch.zeros(length, length, dtype=dtype).masked_fill_(hidden, -torch.inf)
