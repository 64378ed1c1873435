"""Output projection and cross-entropy beside their peers: forward and backward together, time and memory.

The rate counts three matrix products, 6·N·D·V operations, for every peer alike. Memory is what a call allocates above
its inputs, the gradients it returns included.

Legend: N tokens, D model, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from common import Row, absent, gate, optional_peer, peak_memory_mib, report, require_cuda, time_ms
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


def liger_loss() -> Loss:
    apply: Any = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction.apply

    def loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        # With float32 accumulation of the weight's gradient, as ours has it.
        arguments = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)
        result = apply(hidden_ND, weight_VD, targets_N, *arguments)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    return loss


def cce_loss() -> Loss:
    loss: Loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return loss


def peers() -> dict[str, Loss | None]:
    """Every peer; None stands for one that is not installed."""
    return {
        "ours": ours,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        "liger-kernel": liger_loss() if optional_peer("liger-kernel") else None,
        "cut-cross-entropy": cce_loss() if optional_peer("cut-cross-entropy") else None,
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
    )


def measure(name: str, width: int, vocabulary: int) -> list[Row]:
    """Every peer at one shape; one that runs out of memory gets a line that says so."""
    shape = f"{name}: {NUM_TOKENS} x {width} x {vocabulary}"
    tensors = inputs(NUM_TOKENS, width, vocabulary)
    rows = []
    for peer, loss in peers().items():
        if loss is None:
            rows.append(absent("linear_cross_entropy", shape, peer, "TFLOP/s"))
            continue

        def call(loss: Loss = loss) -> list[Tensor]:
            return results(loss, *tensors)

        milliseconds, memory, note = None, None, ""
        try:
            milliseconds = time_ms(call, warmup=2, repeats=10)
            memory = peak_memory_mib(call)
        except torch.cuda.OutOfMemoryError:
            note = "out of memory"
        torch.cuda.empty_cache()
        rate = 6 * NUM_TOKENS * width * vocabulary / milliseconds / 1e9 if milliseconds else None
        rows.append(
            Row(
                op="linear_cross_entropy",
                shape=shape,
                peer=peer,
                milliseconds=milliseconds,
                rate=rate,
                rate_unit="TFLOP/s",
                peak_memory_mib=memory,
                note=note,
            )
        )
    return rows


def main() -> None:
    require_cuda()
    torch.manual_seed(0)
    rows: list[Row] = []
    for name, (width, vocabulary) in SHAPES.items():
        check(name, width, vocabulary)
        torch.cuda.empty_cache()
        rows += measure(name, width, vocabulary)
    report("linear_cross_entropy", rows, gate="passed")


if __name__ == "__main__":
    main()
