"""The plain-torch paths on a CPU, beside the same op as a transformers model runs it in eager mode.

Forward and backward together, on one core, in processor time, so that other programs disturb little. The peers are
written here from the definitions of a Llama layer: float32 norm, rotation by concatenation, all logits held.

Legend: N tokens, D model, F feed-forward width, H heads, C head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from common import Row, gate, report
from minicpm_kernels import linear_cross_entropy, rms_norm_residual, rope, rope_tables, swiglu
from torch import Tensor
from torch.nn import functional as F

N, D, F_WIDTH, H, C = 4_096, 256, 768, 6, 64
EPS, BRANCH_SCALE = 1e-5, 0.7

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def norm_pair() -> tuple[Op, Op]:
    def peer(residual_ND: Tensor, branch_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        residual_ND = residual_ND + branch_ND * BRANCH_SCALE
        x_ND = residual_ND.float()
        x_ND = x_ND * torch.rsqrt(x_ND.pow(2).mean(-1, keepdim=True) + EPS)
        return weight_D * x_ND.to(residual_ND.dtype), residual_ND

    return partial(rms_norm_residual, eps=EPS, branch_scale=BRANCH_SCALE), peer


def rope_pair() -> tuple[Op, Op]:
    cos_NC2, sin_NC2 = rope_tables(torch.arange(N) % 512, 10_000.0 ** (-torch.arange(C // 2) / (C // 2)))
    cos_N1C, sin_N1C = (torch.cat([x, x], -1)[:, None] for x in (cos_NC2, sin_NC2))

    def peer(x_NHC: Tensor) -> Tensor:
        first, second = x_NHC.chunk(2, -1)
        return x_NHC * cos_N1C.to(x_NHC) + torch.cat([-second, first], -1) * sin_N1C.to(x_NHC)

    return lambda x_NHC: rope(x_NHC, cos_NC2, sin_NC2), peer


def swiglu_pair() -> tuple[Op, Op]:
    def peer(gate_up_N2F: Tensor) -> Tensor:
        gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
        return F.silu(gate_NF) * up_NF

    return swiglu, peer


def loss_pair(vocabulary: int) -> tuple[Op, Op]:
    targets_N = torch.randint(0, vocabulary, (N,))

    def ours(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        result = linear_cross_entropy(hidden_ND, weight_VD, targets_N)
        return result.loss_sum / result.num_targets

    return ours, lambda hidden_ND, weight_VD: F.cross_entropy(
        F.linear(hidden_ND, weight_VD).float(), targets_N
    )


def run(op: Op, inputs: tuple[Tensor, ...], autocast: AbstractContextManager[object]) -> list[Tensor]:
    """Outputs, then the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with autocast:
        result = op(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    upstream = [torch.ones_like(x) for x in outputs]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, upstream))


def processor_ms(function: Callable[[], object]) -> float:
    """The fastest of ten calls after one that is not counted."""
    function()
    times = []
    for _ in range(10):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return 1e3 * min(times)


def inputs_of(name: str, shapes: tuple[tuple[int, ...], ...], *, bf16: bool) -> tuple[Tensor, ...]:
    """As in training: weights, residual and final states float32, what a matrix product returned bf16."""
    in_bf16 = {"rope": {0}, "swiglu": {0}, "rms_norm_residual": {1}}.get(name, set()) if bf16 else set()
    inputs = [torch.randn(shape) * 0.1 for shape in shapes]
    return tuple(x.bfloat16() if index in in_bf16 else x for index, x in enumerate(inputs))


def measure(
    name: str, shape: str, ours: Op, peer: Op, inputs: tuple[Tensor, ...], *, bf16: bool
) -> list[Row]:
    """The gate, then both."""
    autocast = torch.autocast("cpu", enabled=bf16 and name == "linear_cross_entropy")
    exact = run(peer, tuple(x.float() for x in inputs), torch.autocast("cpu", enabled=False))
    gate(name, run(ours, inputs, autocast), exact, run(peer, inputs, autocast), floor=4e-3 if bf16 else 1e-6)
    ours_ms, peer_ms = (
        processor_ms(partial(run, ours, inputs, autocast)),
        processor_ms(partial(run, peer, inputs, autocast)),
    )
    line = partial(Row, op=f"{name} {'bf16' if bf16 else 'fp32'}", shape=shape, rate_unit="x the peer")
    return [
        line(peer="ours", milliseconds=ours_ms, rate=peer_ms / ours_ms),
        line(peer="as transformers", milliseconds=peer_ms, rate=1.0),
    ]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, shape, pair, shapes in (
        ("rms_norm_residual", f"{N} x {D}", norm_pair(), ((N, D), (N, D), (D,))),
        ("rope", f"{N} x {H} x {C}", rope_pair(), ((N, H, C),)),
        ("swiglu", f"{N} x 2x{F_WIDTH}", swiglu_pair(), ((N, 2 * F_WIDTH),)),
        ("linear_cross_entropy", f"{N} x {D} x 4096", loss_pair(4_096), ((N, D), (4_096, D))),
        ("linear_cross_entropy", f"{N} x {D} x 8192", loss_pair(8_192), ((N, D), (8_192, D))),
    ):
        for bf16 in (False, True):
            rows += measure(name, shape, *pair, inputs_of(name, shapes, bf16=bf16), bf16=bf16)
    report("cpu", rows, gate="passed", threads=1, clock="processor time, forward and backward")


if __name__ == "__main__":
    main()
