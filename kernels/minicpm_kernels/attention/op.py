"""Causal attention over packed documents: the public function, its custom ops and its gradient.

Legend: N tokens of all documents in one row, H query heads, K key heads (each serves H/K query heads), C
head dim.

The ops are opaque to ``torch.compile`` (whole graphs stay whole around them), to activation checkpointing
(a policy can name ``torch.ops.minicpm_kernels.attention.default``) and to FSDP2. Inside, the backend is
chosen:

- CUDA with Triton: the kernels of attention_triton_fwd.py and attention_triton_bwd.py, on a Hopper card those of
  attention_gluon_fwd.py and attention_gluon_bwd.py (``MINICPM_GLUON=0`` rules them out);
- CPU: torch's own CPU flash attention, one call for each run of documents of equal length;
- elsewhere, and wherever ``MINICPM_KERNELS=reference``: plain torch in float32, which holds all scores.
"""

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from minicpm_kernels.attention.reference import (
    attention_cpu_backward,
    attention_cpu_forward,
    attention_reference,
    attention_reference_backward,
)
from minicpm_kernels.backend import (
    OVERRIDE_VARIABLE,
    Backend,
    autocasts,
    choose_backend,
    interpreter_enabled,
    unsupported_reason_to_large_tiles,
)


def attention(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attend causally within each document; returns (N, H, C) in the type of ``q_NHC``.

    An exact, tiled softmax that never holds the scores (FlashAttention-2, arXiv 2307.08691; on Hopper with warps of
    their own for loads and for softmax, as FlashAttention-3, arXiv 2407.08608).

    Args:
        q_NHC, k_NKC, v_NKC: float32, bfloat16 or float16, all of one type; any strides. Under autocast they
            are cast first, as by torch's own attention.
        cu_seqlens: int32 (number of documents + 1,): document i holds tokens ``cu_seqlens[i]`` up to
            ``cu_seqlens[i + 1]``. Starts with 0, ends with N, never falls; equal neighbours are an empty
            document.
        max_seqlen: length of the longest document or any bound on it. It guides the order of work only.
        scale: factor on the scores, positive; by default 1/sqrt(C). window: the number of latest keys, its
        own included, that a query sees; all of its document by default. deterministic: make the gradients
        bit-equal from call to call (the output always is), as ``torch.use_deterministic_algorithms(True)`` does.

    Raises ``ValueError`` on shapes, types or options that do not fit, naming the argument. Under ``torch.compile``
    leave ``dynamic`` unset: the number of documents and ``max_seqlen`` change from batch to batch.
    """
    out_NHC, _ = attention_with_lse(
        q_NHC,
        k_NKC,
        v_NKC,
        cu_seqlens,
        max_seqlen=max_seqlen,
        scale=scale,
        window=window,
        deterministic=deterministic,
    )
    return out_NHC


def attention_with_lse(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Like ``attention``, and also the natural log of each softmax's denominator: float32 (H, N), no
    gradient."""
    if autocasts(q_NHC) and q_NHC.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q_NHC.device.type)
        q_NHC, k_NKC, v_NKC = q_NHC.to(dtype), k_NKC.to(dtype), v_NKC.to(dtype)
    _check_inputs(q_NHC, k_NKC, v_NKC, cu_seqlens)
    if scale is None:
        scale = q_NHC.shape[-1] ** -0.5
    if not scale > 0:
        raise ValueError(f"attention: scale={scale} must be positive")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window} must be at least 1, or None for the whole document")
    if max_seqlen < 0:
        raise ValueError(f"attention: max_seqlen={max_seqlen} must not be negative")
    out_NHC, lse_HN = _attention_op(
        q_NHC, k_NKC, v_NKC, cu_seqlens, max_seqlen, float(scale), window, deterministic
    )
    return out_NHC, lse_HN.detach()


def _check_inputs(q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cu_seqlens: Tensor) -> None:
    named = (("q", q_NHC), ("k", k_NKC), ("v", v_NKC))
    for name, x in named:
        if x.dim() != 3:
            raise ValueError(f"attention: {name} has {x.dim()} dimensions; give (tokens, heads, head dim)")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dtype != q_NHC.dtype:
            types = ", ".join(f"{n} {t.dtype}" for n, t in named)
            raise ValueError(f"attention: {types}; give one of float32, bfloat16, float16 for all three")
        if x.shape[0] != q_NHC.shape[0] or x.shape[2] != q_NHC.shape[2] or x.device != q_NHC.device:
            raise ValueError(
                f"attention: {name} {tuple(x.shape)} on {x.device} does not fit q {tuple(q_NHC.shape)} on "
                f"{q_NHC.device}; tokens, head dim and device must agree"
            )
    heads, kv_heads = q_NHC.shape[1], k_NKC.shape[1]
    if v_NKC.shape[1] != kv_heads or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"attention: {heads} query, {kv_heads} key and {v_NKC.shape[1]} value heads; keys and values need "
            "the same number, which divides that of the queries"
        )
    shortest = 2 if q_NHC.shape[0] > 0 else 1
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < shortest:
        raise ValueError(
            f"attention: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; "
            "give int32 (number of documents + 1,)"
        )
    if cu_seqlens.device != q_NHC.device:
        raise ValueError(f"attention: cu_seqlens is on {cu_seqlens.device}, q on {q_NHC.device}")


def _check_bounds(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Check the values of ``cu_seqlens``: only where that costs no wait for a device."""
    bounds = cu_seqlens.tolist()
    if (
        bounds[0] != 0
        or bounds[-1] != num_tokens
        or any(end < start for start, end in itertools.pairwise(bounds))
    ):
        raise ValueError(
            f"attention: cu_seqlens must start with 0, never fall and end with the number of tokens, {num_tokens}; "
            f"it goes from {bounds[0]} to {bounds[-1]}"
        )


def attention_backend(q_NHC: Tensor) -> Backend:
    """What attention of these queries runs on, and why: like ``choose_backend``, but knowing the kernels'
    limits.

    Raises ``RuntimeError`` where ``MINICPM_KERNELS=triton`` asks for kernels that do not serve these tensors.
    """
    backend = choose_backend(q_NHC, "attention")
    if backend.name == "reference":
        return backend
    unsupported_reason = _unsupported_reason(q_NHC)
    if unsupported_reason and os.environ.get(OVERRIDE_VARIABLE) == "triton":
        raise RuntimeError(
            f"attention: {OVERRIDE_VARIABLE}=triton, but {unsupported_reason}; unset {OVERRIDE_VARIABLE}"
        )
    if unsupported_reason:
        return Backend(name="reference", reason=f"attention: plain torch, because {unsupported_reason}")
    return backend


def _unsupported_reason(q_NHC: Tensor) -> str:
    """Why the Triton kernels do not serve these tensors, as a clause; empty when they do."""
    head_dim = q_NHC.shape[2]
    if head_dim not in (16, 32, 64, 128):
        return f"the kernels serve head dims 16, 32, 64 and 128, not {head_dim}"
    if q_NHC.dtype == torch.float32 and not interpreter_enabled():
        return "tensor cores would round float32 to tf32"
    if q_NHC.is_cuda:
        capability = torch.cuda.get_device_capability(q_NHC.device)
        if capability < (8, 0):
            return f"the kernels need compute capability 8.0, the card has {capability[0]}.{capability[1]}"
        if head_dim == 128:
            return unsupported_reason_to_large_tiles(q_NHC.device)
    return ""


@torch.library.custom_op("minicpm_kernels::attention", mutates_args=())
def _attention_op(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    if attention_backend(q_NHC).name == "triton":
        with torch.cuda.device_of(q_NHC):
            return _forward_kernel(q_NHC)(
                q_NHC, k_NKC, v_NKC, cu_seqlens, max_seqlen=max_seqlen, scale=scale, window=window
            )
    if q_NHC.device.type == "cpu":
        _check_bounds(cu_seqlens, q_NHC.shape[0])
        return attention_cpu_forward(q_NHC, k_NKC, v_NKC, cu_seqlens, scale=scale, window=window)
    out_NHC, lse_HN = attention_reference(q_NHC, k_NKC, v_NKC, cu_seqlens, scale=scale, window=window)
    return out_NHC.to(q_NHC.dtype), lse_HN


def _forward_kernel(q_NHC: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """What launches the kernel for these queries."""
    with suppress(ImportError, AttributeError):  # Gluon is experimental: another Triton may have another
        from minicpm_kernels.attention.gluon import gluon_unsupported_reason
        from minicpm_kernels.attention.gluon_fwd import attention_gluon_forward

        if not gluon_unsupported_reason(q_NHC.shape[2], q_NHC.dtype, q_NHC.device):
            return attention_gluon_forward
    from minicpm_kernels.attention.triton_fwd import attention_triton_forward

    return attention_triton_forward


def _backward_kernel(q_NHC: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What launches the backward's kernels for these queries."""
    with suppress(ImportError, AttributeError):
        from minicpm_kernels.attention.gluon_bwd import (
            attention_gluon_backward,
            gluon_backward_unsupported_reason,
        )

        if not gluon_backward_unsupported_reason(q_NHC.shape[2], q_NHC.dtype, q_NHC.device):
            return attention_gluon_backward
    from minicpm_kernels.attention.triton_bwd import attention_triton_backward

    return attention_triton_backward


@_attention_op.register_fake
def _(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    num_tokens, heads, _ = q_NHC.shape
    return q_NHC.new_empty(q_NHC.shape), q_NHC.new_empty((heads, num_tokens), dtype=torch.float32)


@torch.library.custom_op("minicpm_kernels::attention_backward", mutates_args=())
def _attention_backward_op(
    d_out_NHC: Tensor,
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    out_NHC: Tensor,
    lse_HN: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if attention_backend(q_NHC).name == "triton":
        with torch.cuda.device_of(q_NHC):
            return _backward_kernel(q_NHC)(
                d_out_NHC, q_NHC, k_NKC, v_NKC, out_NHC, lse_HN, cu_seqlens,
                max_seqlen=max_seqlen, scale=scale, window=window,
                deterministic=deterministic or _torch_asks_for_determinism(),
            )  # fmt: skip
    if q_NHC.device.type == "cpu":
        return attention_cpu_backward(
            d_out_NHC, q_NHC, k_NKC, v_NKC, out_NHC, lse_HN, cu_seqlens, scale=scale, window=window
        )
    return attention_reference_backward(
        d_out_NHC, q_NHC, k_NKC, v_NKC, cu_seqlens, scale=scale, window=window
    )


def _torch_asks_for_determinism() -> bool:
    """Whether torch shall run deterministic algorithms or fail; where it shall only warn, the faster one runs."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


@_attention_backward_op.register_fake
def _(
    d_out_NHC: Tensor,
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    out_NHC: Tensor,
    lse_HN: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_NHC.new_empty(q_NHC.shape), k_NKC.new_empty(k_NKC.shape), v_NKC.new_empty(v_NKC.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_NHC, k_NKC, v_NKC, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q_NHC, k_NKC, v_NKC, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out_NHC: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out_NHC is None:
        return (None,) * 8
    gradients = _attention_backward_op(d_out_NHC, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None, None)


_attention_op.register_autograd(_backward, setup_context=_save_for_backward)
