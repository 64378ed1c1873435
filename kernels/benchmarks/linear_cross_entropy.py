"""Output projection and cross-entropy beside their peers: forward and backward together, time and memory.

The rate counts three matrix products, 6·N·D·V operations, for every peer alike. Memory is what a call allocates above
its inputs, the gradients it returns included.

Legend: N tokens, D model, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import (
    Results,
    Row,
    attempt,
    gate,
    missing,
    optional_peer,
    peak_memory_mib,
    require_cuda,
    time_ms,
)
from minicpm_kernels import linear_cross_entropy
from minicpm_kernels.linear_cross_entropy import linear_cross_entropy_reference
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda"
NUM_TOKENS = 16_384
GATE_TOKENS = 2_048  # the reference holds all logits in float32
SHAPES = {"MiniCPM-2.4B": (2_304, 122_753), "MiniCPM-1.2B": (1_536, 73_440)}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    result = linear_cross_entropy(hidden_ND, weight_VD, targets_N)
    return result.loss_sum / result.num_targets


def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    result = linear_cross_entropy_reference(hidden_ND, weight_VD, targets_N)
    return result.loss_sum / result.num_targets


def eager(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N)


def liger(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    apply: Any = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction.apply
    # With float32 accumulation of the weight's gradient, as ours has it.
    arguments = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)
    result = apply(hidden_ND, weight_VD, targets_N, *arguments)
    value: Tensor = result[0] if isinstance(result, tuple) else result
    return value


def cce(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, filter_eps: str | None) -> Tensor:
    """By default it skips blocks of gradients that are small beside bf16; with None it computes all, as others do."""
    loss: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    value: Tensor = loss(hidden_ND, weight_VD, targets_N, filter_eps=filter_eps)
    return value


# Every peer, and the distribution that it comes with where that is not torch.
PEERS: dict[str, tuple[Loss, str | None]] = {
    "ours": (ours, None),
    "eager": (eager, None),
    "torch.compile": (torch.compile(eager, dynamic=False), None),
    "liger-kernel": (liger, "liger-kernel"),
    "cut-cross-entropy": (partial(cce, filter_eps="high"), "cut-cross-entropy"),
    "cut-cross-entropy, all": (partial(cce, filter_eps=None), "cut-cross-entropy"),
}


def inputs(num_tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden_ND = torch.randn(num_tokens, width, device=DEVICE, dtype=torch.bfloat16)
    weight_VD = torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16) / width**0.5
    targets_N = torch.randint(0, vocabulary, (num_tokens,), device=DEVICE)
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N


def results(loss: Loss, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> list[Tensor]:
    """Loss and both gradients."""
    value = loss(hidden_ND, weight_VD, targets_N)
    return [value.detach(), *torch.autograd.grad(value, (hidden_ND, weight_VD))]


def check(name: str, width: int, vocabulary: int) -> None:
    """The gate, on fewer tokens."""
    hidden_ND, weight_VD, targets_N = inputs(GATE_TOKENS, width, vocabulary)
    exact_ND, exact_VD = (x.detach().float().requires_grad_() for x in (hidden_ND, weight_VD))
    exact = results(reference, exact_ND, exact_VD, targets_N)
    gate(
        f"linear_cross_entropy {name}",
        results(ours, hidden_ND, weight_VD, targets_N),
        exact,
        results(eager, hidden_ND, weight_VD, targets_N),
        floor=1e-5,  # the loss is one number, whose error may happen to be nothing for eager
    )


def time_peer(shape: str, peer: str, tensors: tuple[Tensor, Tensor, Tensor]) -> Row:
    """One peer; one that is absent, fails or runs out of memory gets a line that says so."""
    op, unit = "linear_cross_entropy", "TFLOP/s"
    loss, distribution = PEERS[peer]
    if distribution and not optional_peer(distribution):
        return missing(op, shape, peer, unit, "absent")

    def call() -> list[Tensor]:
        return results(loss, *tensors)

    measured, note = attempt(lambda: (time_ms(call, warmup=2, repeats=10), peak_memory_mib(call)))
    if measured is None:
        return missing(op, shape, peer, unit, note)
    ms, memory = measured
    (num_tokens, width), vocabulary = tensors[0].shape, tensors[1].shape[0]
    rate = 6 * num_tokens * width * vocabulary / ms / 1e9
    return Row(
        op=op, shape=shape, peer=peer, milliseconds=ms, rate=rate, rate_unit=unit, peak_memory_mib=memory
    )


def main() -> None:
    require_cuda()
    torch.manual_seed(0)
    for name, (width, vocabulary) in SHAPES.items():
        check(name, width, vocabulary)
        torch.cuda.empty_cache()
    rows = Results("linear_cross_entropy", gate="passed")
    for name, (width, vocabulary) in SHAPES.items():
        tensors = inputs(NUM_TOKENS, width, vocabulary)
        for peer in PEERS:
            rows.add(time_peer(f"{name}: {NUM_TOKENS} x {width} x {vocabulary}", peer, tensors))
    rows.finish()


if __name__ == "__main__":
    main()
