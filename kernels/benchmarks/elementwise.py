"""RMSNorm, SwiGLU and the rotary embedding beside their peers: they move bytes, so the rate is bytes a second.

The bytes are the fewest that the op can move, each input read and each output written once, for every peer alike.
Shapes are MiniCPM-2.4B's at 16,384 tokens.

Legend: N tokens, D model, F feed-forward width, H heads, C head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import Results, Row, attempt, gate, missing, optional_peer, require_cuda, time_ms
from minicpm_kernels import rms_norm, rms_norm_residual, rope, rope_tables, swiglu
from minicpm_kernels.rms_norm import rms_norm_reference, rms_norm_residual_reference
from minicpm_kernels.rope import rope_reference
from minicpm_kernels.swiglu import swiglu_reference
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda"
N, D, F_WIDTH, H, C = 16_384, 2_304, 5_760, 72, 64
EPS, BRANCH_SCALE = 1e-5, 1.4 / 40**0.5

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op on one shape; `exact` is its float32 reference, `ops` the peers, ours and eager torch among them.

    `inputs_of` holds what a peer takes instead of `inputs`, where that suits it better.
    """

    name: str
    shape: str
    inputs: tuple[Tensor, ...]
    exact: Op
    ops: Mapping[str, Op]
    forward_bytes: int
    backward_bytes: int
    inputs_of: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def rms_norm_case(liger: Any) -> Case:
    def eager(x_ND: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(x_ND, weight_D.shape, weight_D, EPS)

    ops: dict[str, Op] = {"ours": lambda x, w: rms_norm(x, w, eps=EPS), "eager": eager}
    ops["torch.compile"] = torch.compile(eager, dynamic=False)
    if liger:
        ops["liger-kernel"] = lambda x, w: liger.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    return Case(
        name="rms_norm",
        shape=f"{N} x {D}",
        inputs=(random(N, D), random(D)),
        exact=lambda x, w: rms_norm_reference(x, w, eps=EPS),
        ops=ops,
        forward_bytes=2 * N * D * 2,
        backward_bytes=3 * N * D * 2,
    )


def rms_norm_residual_case(liger: Any) -> Case:
    def eager(residual_ND: Tensor, branch_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        new_residual_ND = torch.add(residual_ND, branch_ND, alpha=BRANCH_SCALE)
        return F.rms_norm(new_residual_ND, weight_D.shape, weight_D, EPS), new_residual_ND

    def liger_op(residual_ND: Tensor, branch_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, ...]:
        # It has no factor on the branch, so that costs a pass of its own.
        scaled_ND = branch_ND * BRANCH_SCALE
        return tuple(
            liger.LigerFusedAddRMSNormFunction.apply(scaled_ND, residual_ND, weight_D, EPS, 0.0, "llama")
        )

    def ours(residual_ND: Tensor, branch_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_residual(residual_ND, branch_ND, weight_D, eps=EPS, branch_scale=BRANCH_SCALE)

    ops: dict[str, Op] = {"ours": ours, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    if liger:
        ops["liger-kernel"] = liger_op
    return Case(
        name="rms_norm_residual",
        shape=f"{N} x {D}",
        inputs=(random(N, D), random(N, D), random(D)),
        exact=lambda r, b, w: rms_norm_residual_reference(r, b, w, eps=EPS, branch_scale=BRANCH_SCALE),
        ops=ops,
        forward_bytes=4 * N * D * 2,
        backward_bytes=5 * N * D * 2,
    )


def swiglu_case(liger: Any) -> Case:
    def eager(gate_up_N2F: Tensor) -> Tensor:
        gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
        return F.silu(gate_NF) * up_NF

    ops: dict[str, Op] = {
        "ours": swiglu,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    if liger:
        ops["liger-kernel"] = liger.LigerFusedGateUpSiLUMulFunction.apply
    return Case(
        name="swiglu",
        shape=f"{N} x 2x{F_WIDTH}",
        inputs=(random(N, 2 * F_WIDTH),),
        exact=swiglu_reference,
        ops=ops,
        forward_bytes=3 * N * F_WIDTH * 2,
        backward_bytes=5 * N * F_WIDTH * 2,
    )


def rope_case(liger: Any) -> Case:
    """Queries and keys of packed rows of 4,096, as one slice of the merged projection."""
    inv_freq_C2 = 10_000.0 ** (-torch.arange(C // 2, device=DEVICE) / (C // 2))
    cos_NC2, sin_NC2 = rope_tables(torch.arange(N, device=DEVICE) % 4096, inv_freq_C2)
    cos_1NC, sin_1NC = (torch.cat([x, x], -1)[None].bfloat16() for x in (cos_NC2, sin_NC2))

    def eager(x_NHC: Tensor) -> Tensor:
        first, second = x_NHC.chunk(2, -1)
        return x_NHC * cos_1NC[0, :, None] + torch.cat([-second, first], -1) * sin_1NC[0, :, None]

    def liger_op(q_NHC: Tensor, k_NHC: Tensor) -> tuple[Tensor, ...]:
        # It turns its inputs in place where they are not slices, and so they are not here.
        q_1HNC, k_1HNC = (x.transpose(0, 1)[None] for x in (q_NHC, k_NHC))
        return tuple(liger.LigerRopeFunction.apply(q_1HNC, k_1HNC, cos_1NC, sin_1NC))

    ops: dict[str, Op] = {"ours": lambda x: rope(x, cos_NC2, sin_NC2), "eager": eager}
    ops["torch.compile"] = torch.compile(eager, dynamic=False)
    if liger:
        ops["liger-kernel"] = liger_op
    return Case(
        name="rope",
        shape=f"{N} x {H} x {C}",
        inputs=(random(N, H + H // 2, C)[:, :H],),
        exact=lambda x: rope_reference(x, cos_NC2, sin_NC2),
        ops=ops,
        forward_bytes=2 * N * H * C * 2 + 2 * N * (C // 2) * 4,
        backward_bytes=2 * N * H * C * 2 + 2 * N * (C // 2) * 4,
        inputs_of={"liger-kernel": (random(N, H // 2, C), random(N, H // 2, C))},
    )


def run(op: Op, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, then the gradients of the inputs."""
    outputs, leaves = forward_of(op, inputs)
    gradients = [g.to(x.dtype) for g, x in zip(upstream, outputs, strict=True)]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, gradients))


def forward_of(op: Op, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, the leaves that they can be differentiated by)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = op(*leaves)
    return [result] if isinstance(result, Tensor) else list(result), leaves


def check(case: Case) -> None:
    """The gate."""
    outputs, _ = forward_of(case.ops["eager"], case.inputs)
    upstream = tuple(torch.randn_like(x) for x in outputs)
    exact = run(case.exact, tuple(x.float() for x in case.inputs), upstream)
    gate(
        case.name,
        run(case.ops["ours"], case.inputs, upstream),
        exact,
        run(case.ops["eager"], case.inputs, upstream),
    )


def time_peer(case: Case, peer: str) -> list[Row]:
    """Forward and backward; a peer that fails gets a line that says so."""
    op, inputs = case.ops[peer], case.inputs_of.get(peer, case.inputs)

    def forward() -> float:
        with torch.no_grad():
            return time_ms(lambda: op(*inputs))

    def backward() -> float:
        outputs, leaves = forward_of(op, inputs)
        upstream = [torch.randn_like(x) for x in outputs]
        return time_ms(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))

    rows = []
    for direction, timed, num_bytes in (
        ("forward", forward, case.forward_bytes),
        ("backward", backward, case.backward_bytes),
    ):
        name, unit = f"{case.name} {direction}", "TB/s"
        ms, note = attempt(timed)
        if ms is None:
            rows.append(missing(name, case.shape, peer, unit, note))
            continue
        rate = num_bytes / ms / 1e9
        rows.append(Row(op=name, shape=case.shape, peer=peer, milliseconds=ms, rate=rate, rate_unit=unit))
    return rows


def copy_row() -> Row:
    """The ceiling: torch's own copy of a tensor as large as the largest here."""
    source = random(N, 2 * F_WIDTH)
    target = torch.empty_like(source)
    milliseconds = time_ms(lambda: target.copy_(source))
    return Row(
        op="copy",
        shape=f"{N} x {2 * F_WIDTH}",
        peer="torch",
        milliseconds=milliseconds,
        rate=2 * source.nbytes / milliseconds / 1e9,
        rate_unit="TB/s",
    )


def main() -> None:
    require_cuda()
    torch.manual_seed(0)
    liger, fault = None, "absent"
    if optional_peer("liger-kernel"):
        liger, fault = attempt(partial(importlib.import_module, "liger_kernel.ops"))
    cases = [make(liger) for make in (rms_norm_case, rms_norm_residual_case, swiglu_case, rope_case)]
    for case in cases:
        check(case)
    results = Results("elementwise", gate="passed")
    results.add(copy_row())
    for case in cases:
        for peer in case.ops:
            results.add(*time_peer(case, peer))
        if fault:
            names = (f"{case.name} {direction}" for direction in ("forward", "backward"))
            results.add(*(missing(name, case.shape, "liger-kernel", "TB/s", fault) for name in names))
    results.finish()


if __name__ == "__main__":
    main()
