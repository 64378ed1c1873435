"""Output projection and cross-entropy in one op: loss and both gradients, the logits never held.

The logits of a chunk of tokens come from a library matmul, are turned into their own gradient in place, and
two more matmuls carry that to the hidden states and the weight before the next chunk takes the same memory. The
gradients are therefore ready when the forward ends; the backward only scales them. With 16,384 tokens and MiniCPM's
122,753 entries the logits held at any time are 1 GB instead of 4 GB in bf16 beside 8 GB in fp32.

Legend: N tokens, M tokens of a chunk, R rows of a block, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minicpm_kernels.backend import choose_backend

# Few large chunks keep the matmuls efficient: on a GPU 4096 tokens fill the card.
_CHUNK_TOKENS_GPU = 4096
# On a CPU 1024 tokens do, and twice as many where the vocabulary is small: every chunk, and every block below, costs
# meetings of all threads, which are slow where other programs want the cores too.
_CHUNK_TOKENS_CPU = 1024
_CHUNK_ELEMENTS_CPU = 2**23
# Plain torch works on blocks of about this many logits, so that its passes over a block find it in cache. Measured at V
# 4096 and 8192, D 256: 2^19 to 2^21 are alike on one free core, the largest wins on two busy ones.
_BLOCK_ELEMENTS = 2**21
# Rows of the logits start at multiples of 256 bytes: tensor cores are several times slower on an odd row length.
_VOCABULARY_MULTIPLE = 128


class LinearCrossEntropy(NamedTuple):
    """Sums over the targets that are not ignored, each a float32 scalar tensor; divide by `num_targets`.

    `loss_sum` is the cross-entropy in nats and `z_loss_sum` is z_loss · Σ log(Z)². One pass computes the gradient of
    their sum, and `loss_sum` carries all of it; `z_loss_sum` is detached. Train on `loss_sum + z_loss_sum`.
    """

    loss_sum: Tensor
    z_loss_sum: Tensor
    num_targets: Tensor


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> LinearCrossEntropy:
    """Cross-entropy of softmax(logit_scale · hidden · weightᵀ) with `targets_N`, summed, and its gradients.

    Never holds all logits at once (nor do Cut Cross-Entropy, arXiv 2411.09009, and Liger, arXiv 2410.10989): a
    chunk of them becomes its own gradient in place.

    Args:
        hidden_ND: final states, (N, D).
        weight_VD: output matrix (the embedding where tied), (V, D). Its gradient is accumulated in float32.
        targets_N: int64 token ids below V; `ignore_index` takes a token out of the loss.
        logit_scale: factor on the logits (MiniCPM: dim_model_base / hidden_size), positive.
        z_loss: weight of log(Z)² (PaLM, section 5), 0 for none.

    Matmuls run in autocast's dtype where autocast is on, else in that of the inputs; the softmax in float32.
    Without gradients (`torch.no_grad`, or neither input asks) only the loss is computed. On a GPU a target that
    is no token makes the loss NaN; on a CPU it raises.

    Raises: ValueError for shapes or dtypes that do not fit.
    """
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be positive, not {logit_scale}")
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = hidden_ND.dtype
        if weight_VD.dtype != dtype:
            raise ValueError(f"hidden is {dtype} and weight {weight_VD.dtype}: cast one, or use autocast")
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        shapes = f"{tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        raise ValueError(f"hidden and weight must be (N, D) and (V, D), not {shapes}")
    if targets_N.shape != hidden_ND.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(
            f"targets must be {hidden_ND.shape[0]} int64, not {targets_N.dtype} {tuple(targets_N.shape)}"
        )

    num_targets = (targets_N != ignore_index).sum().float()
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        loss_sum, z_loss_sum = _Function.apply(  # type: ignore[no-untyped-call]
            hidden_ND,
            weight_VD,
            targets_N,
            logit_scale,
            z_loss,
            ignore_index,
            dtype,
            hidden_ND.requires_grad,
            weight_VD.requires_grad,
        )
    else:
        sums, _, _ = linear_cross_entropy_op(
            hidden_ND, weight_VD, targets_N, logit_scale, z_loss, ignore_index, dtype, False, False
        )
        loss_sum, z_loss_sum = sums.unbind()
    return LinearCrossEntropy(loss_sum=loss_sum, z_loss_sum=z_loss_sum, num_targets=num_targets)


def linear_cross_entropy_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> LinearCrossEntropy:
    """The definition, in plain torch with all logits held; `z_loss_sum` is differentiable here."""
    logits_NV = F.linear(hidden_ND, weight_VD).float() * logit_scale
    loss_sum = F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=ignore_index)
    kept_N = targets_N != ignore_index
    z_loss_sum = z_loss * (logits_NV.logsumexp(-1).square() * kept_N).sum()
    return LinearCrossEntropy(loss_sum=loss_sum, z_loss_sum=z_loss_sum, num_targets=kept_N.sum().float())


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        logit_scale: float,
        z_loss: float,
        ignore_index: int,
        dtype: torch.dtype,
        hidden_needs_grad: bool,
        weight_needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        sums, d_hidden_ND, d_weight_VD = linear_cross_entropy_op(
            hidden_ND,
            weight_VD,
            targets_N,
            logit_scale,
            z_loss,
            ignore_index,
            dtype,
            hidden_needs_grad,
            weight_needs_grad,
        )
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        loss_sum, z_loss_sum = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(z_loss_sum)
        return loss_sum, z_loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        # In float32, because torch would round the factor itself to bf16.
        d_hidden = (d_hidden_ND.float() * grad).to(hidden_dtype) if needs_hidden else None
        d_weight = None
        if needs_weight:  # in one pass: a second float32 matrix of this size would be a gigabyte
            d_weight = torch.empty_like(d_weight_VD, dtype=weight_dtype)
            torch.mul(d_weight_VD, grad, out=d_weight)
        return d_hidden, d_weight, None, None, None, None, None, None, None


@torch.library.custom_op("minicpm_kernels::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
    dtype: torch.dtype,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums of loss and z-loss (2,) float32, d_hidden (N, D) in `dtype`, d_weight (V, D) float32).

    A gradient not asked for is an empty tensor.
    """
    task = _Task(
        logit_scale=logit_scale,
        z_loss=z_loss,
        ignore_index=ignore_index,
        hidden_needs_grad=hidden_needs_grad,
        weight_needs_grad=weight_needs_grad,
        use_triton=choose_backend(hidden_ND, "linear_cross_entropy").name == "triton",
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        weight_VD = weight_VD.to(dtype)
        if task.use_triton:  # the kernel passes over ignored rows; picking them out would make the host wait
            with torch.cuda.device_of(hidden_ND):
                return _by_chunks(hidden_ND.to(dtype), weight_VD, targets_N.contiguous(), task)
        kept_N = (targets_N != ignore_index).nonzero().squeeze(1)
        if kept_N.numel() == targets_N.numel():
            return _by_chunks(hidden_ND.to(dtype), weight_VD, targets_N, task)
        sums, d_kept_ND, d_weight_VD = _by_chunks(
            hidden_ND[kept_N].to(dtype), weight_VD, targets_N[kept_N], task
        )
        if not hidden_needs_grad:
            return sums, d_kept_ND, d_weight_VD
        d_hidden_ND = hidden_ND.new_zeros(hidden_ND.shape, dtype=dtype)
        return sums, d_hidden_ND.index_copy_(0, kept_N, d_kept_ND), d_weight_VD


@linear_cross_entropy_op.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
    dtype: torch.dtype,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden_ND = hidden_ND.new_empty(hidden_ND.shape if hidden_needs_grad else (0,), dtype=dtype)
    d_weight_VD = weight_VD.new_empty(weight_VD.shape if weight_needs_grad else (0,), dtype=torch.float32)
    return hidden_ND.new_empty(2, dtype=torch.float32), d_hidden_ND, d_weight_VD


@dataclass(frozen=True, kw_only=True)
class _Task:
    logit_scale: float
    z_loss: float
    ignore_index: int
    hidden_needs_grad: bool
    weight_needs_grad: bool
    use_triton: bool


def _by_chunks(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, task: _Task
) -> tuple[Tensor, Tensor, Tensor]:
    """The op itself, on inputs of one dtype."""
    if task.use_triton:
        from minicpm_kernels.linear_cross_entropy_triton import gradient_in_place
    num_tokens, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
    needs_grad = task.hidden_needs_grad or task.weight_needs_grad
    chunk = (
        _CHUNK_TOKENS_GPU if hidden_ND.is_cuda else max(_CHUNK_TOKENS_CPU, _CHUNK_ELEMENTS_CPU // vocabulary)
    )
    chunk = min(chunk, max(num_tokens, 1))
    row_stride = (
        -(-vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE if task.use_triton else vocabulary
    )
    buffer_MV = hidden_ND.new_empty(chunk, row_stride)[:, :vocabulary]
    sums = hidden_ND.new_zeros(2, dtype=torch.float32)
    d_hidden_ND = hidden_ND.new_empty(hidden_ND.shape if task.hidden_needs_grad else (0,))
    d_weight_VD = weight_VD.new_empty(
        weight_VD.shape if task.weight_needs_grad else (0,), dtype=torch.float32
    )
    if not num_tokens:
        d_weight_VD.zero_()
    for start in range(0, num_tokens, chunk):
        hidden_MD = hidden_ND[start : start + chunk]
        targets_M = targets_N[start : start + chunk]
        logits_MV = buffer_MV[: hidden_MD.shape[0]]
        torch.mm(hidden_MD, weight_VD.t(), out=logits_MV)
        if task.use_triton:
            sums += gradient_in_place(
                logits_MV, targets_M, task.logit_scale, task.z_loss, task.ignore_index, needs_grad
            )
        else:
            sums += _gradient_in_place_torch(logits_MV, targets_M, task.logit_scale, task.z_loss, needs_grad)
        if task.hidden_needs_grad:
            torch.mm(logits_MV, weight_VD, out=d_hidden_ND[start : start + chunk])
        if task.weight_needs_grad:
            _add_product(d_weight_VD, logits_MV.t(), hidden_MD, first=start == 0)
    return sums, d_hidden_ND, d_weight_VD


def _gradient_in_place_torch(
    logits_MV: Tensor, targets_M: Tensor, logit_scale: float, z_loss: float, needs_grad: bool
) -> Tensor:
    """Turn unscaled logits into the gradient with respect to them; returns the sums of loss and z-loss, (2,)."""
    num_rows = max(8, _BLOCK_ELEMENTS // logits_MV.shape[1])
    losses, z_losses = [], []
    for start in range(0, logits_MV.shape[0], num_rows):
        rows_RV = logits_MV[start : start + num_rows]
        targets_R1 = targets_M[start : start + num_rows, None]
        work_RV = rows_RV.float()  # the rows themselves where they are float32 already
        if logit_scale != 1.0:
            work_RV.mul_(logit_scale)
        highest_R1 = work_RV.amax(-1, keepdim=True)
        target_logit_R1 = work_RV.gather(1, targets_R1)
        torch.softmax(work_RV, -1, out=work_RV)
        # The largest probability is 1/Σ exp(x - max), at least 1/V: its logarithm is safe, unlike the target's.
        lse_R1 = highest_R1 - work_RV.amax(-1, keepdim=True).log_()
        losses.append((lse_R1 - target_logit_R1).sum())
        z_losses.append(lse_R1.square().sum())
        if not needs_grad:
            continue
        if z_loss:
            work_RV.mul_(1.0 + 2.0 * z_loss * lse_R1)
        work_RV.scatter_add_(1, targets_R1, torch.full_like(target_logit_R1, -1.0))
        if logit_scale != 1.0:
            work_RV.mul_(logit_scale)
        if work_RV is not rows_RV:
            rows_RV.copy_(work_RV)
    return torch.stack([torch.stack(losses).sum(), z_loss * torch.stack(z_losses).sum()])


def _add_product(sum_VD: Tensor, left_VM: Tensor, right_MD: Tensor, *, first: bool) -> None:
    """sum += left · right (the first time: =), with `sum` in float32 whatever the factors are."""
    if left_VM.dtype == torch.float32:
        sum_VD.addmm_(left_VM, right_MD, beta=0.0 if first else 1.0)
    elif sum_VD.is_cuda:
        beta = 0.0 if first else 1.0
        torch.addmm(sum_VD, left_VM, right_MD, out_dtype=torch.float32, beta=beta, out=sum_VD)
    elif first:
        sum_VD.copy_(left_VM @ right_MD)
    else:
        sum_VD.add_(left_VM @ right_MD)
