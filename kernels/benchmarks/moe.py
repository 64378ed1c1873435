"""The mixture-of-experts layer forward and backward beside its peers, at MiniCPM's shape and a fine-grained one;
`--tune` times other tiles of our kernels.

A layer is router and experts. Rates count the experts' matmuls only: 6·N·K·D·F operations forward, 12·N·K·D·F
backward, for every peer alike. Before anything is timed, the experts' output and every gradient at each shape must be
as exact as those of torch's grouped_mm, and two calls bit-equal; otherwise nothing is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from common import GateError, Row, attempt, gate, missing, peak_memory_mib, run_benchmark, time_ms
from minicpm_kernels import moe_experts, moe_layer
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer on one batch. ``skew`` is what the first expert's logits gain: with 0 the load is nearly even."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    skew: float = 0.0

    @property
    def forward_flop(self) -> float:
        return 6.0 * self.tokens * self.top_k * self.width * self.hidden


SHAPES = (
    Shape(name="d 2304, f 5760, 8 top-2, 16k", tokens=16_384, width=2304, hidden=5760, experts=8, top_k=2),
    Shape(name="the same, skewed", tokens=16_384, width=2304, hidden=5760, experts=8, top_k=2, skew=2.0),
    Shape(name="d 1536, f 1024, 32 top-2, 24k", tokens=24_576, width=1536, hidden=1024, experts=32, top_k=2),
)

# From x, router weight, gate_up and down to the output and the two losses.
Layer = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def ours(shape: Shape) -> Layer:
    return partial(moe_layer, num_experts_per_tok=shape.top_k)


def torch_router(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probabilities = logits.softmax(-1)
    top, experts = probabilities.topk(top_k, dim=-1)
    chosen = experts[..., None] == torch.arange(logits.shape[1], device=logits.device)
    balance = logits.shape[1] * (chosen.float().mean((0, 1)) * probabilities.mean(0)).sum()
    return top / top.sum(-1, keepdim=True), experts, balance, logits.logsumexp(-1).square().mean()


def grouped_experts(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, experts: Tensor) -> Tensor:
    """Sort by expert, two grouped_mm, gather back: the layer one would write with torch alone."""
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    chosen = pairs[:, None] == torch.arange(len(down), device=x.device)
    ends = chosen.sum(0).cumsum(0).int()
    hidden = F.grouped_mm(x[order // experts.shape[1]], gate_up.transpose(1, 2), offs=ends)
    gate_half, up_half = hidden.chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate_half) * up_half, down.transpose(1, 2), offs=ends)
    return (y[order.argsort()].view(*experts.shape, -1) * weights[..., None]).sum(1).to(x.dtype)


def looped_experts(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, experts: Tensor) -> Tensor:
    """One dense feed-forward an expert, on the tokens that chose it; waits for the device at every expert."""
    out = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for expert, (matrix, back) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, k = torch.where(experts == expert)
        gate_half, up_half = F.linear(x[token], matrix).chunk(2, dim=-1)
        y = F.linear(F.silu(gate_half) * up_half, back)
        out = out.index_add(0, token, y * weights[token, k, None])
    return out.to(x.dtype)


def torch_layer(shape: Shape, experts_of: Callable[..., Tensor]) -> Layer:
    def run(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, experts, balance, z = torch_router(F.linear(x.float(), router.float()), shape.top_k)
        return experts_of(x, weights, gate_up, down, experts=experts), balance, z

    return run


@cache
def compiled_experts() -> Any:
    return torch.compile(grouped_experts, dynamic=False)


def peers(shape: Shape) -> dict[str, Layer]:
    """Who is timed at a shape, ours first."""
    return {
        "ours": ours(shape),
        "torch grouped_mm": torch_layer(shape, grouped_experts),
        "torch grouped_mm, compiled": torch_layer(
            shape, lambda *tensors, experts: compiled_experts()(*tensors, experts=experts)
        ),
        "torch loop over experts": torch_layer(shape, looped_experts),
    }


def inputs(shape: Shape) -> list[Tensor]:
    """x, router weight, gate_up and down, all to be differentiated, and the output's gradient."""
    torch.manual_seed(0)
    normal = partial(torch.randn, device="cuda")
    router = normal(shape.experts, shape.width) * shape.width**-0.5
    x = normal(shape.tokens, shape.width)
    if shape.skew:
        # A direction that all tokens share, and that the first expert's row points along.
        x += 1.0
        router[0] += shape.skew / shape.width
    leaves = (
        x,
        router,
        normal(shape.experts, 2 * shape.hidden, shape.width) * shape.width**-0.5,
        normal(shape.experts, shape.width, shape.hidden) * shape.hidden**-0.5,
    )
    return [
        *(leaf.bfloat16().requires_grad_() for leaf in leaves),
        normal(shape.tokens, shape.width).bfloat16(),
    ]


def check(shape: Shape) -> None:
    """The gate: the experts under one routing, so that a near tie in the router cannot hide or fake an error."""
    x, router, gate_up, down, d_out = inputs(shape)
    with torch.no_grad():
        weights, experts, *_ = torch_router(F.linear(x.float(), router.float()), shape.top_k)
    experts = experts.int()

    def results(run: Callable[..., Tensor], *, wide: bool = False) -> list[Tensor]:
        leaves = [x, weights, gate_up, down]
        leaves = [(leaf.detach().float() if wide else leaf.detach()).requires_grad_() for leaf in leaves]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]

    def our_experts(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe_experts(x, weights, experts, gate_up, down)

    first, second = results(our_experts), results(our_experts)
    if not all(torch.equal(one, other) for one, other in zip(first, second, strict=True)):
        raise GateError(f"moe {shape.name}: two calls differ")
    del second
    exact = results(partial(looped_experts, experts=experts), wide=True)
    gate(f"moe {shape.name}", first, exact, results(partial(grouped_experts, experts=experts)))


def time_and_memory(run: Callable[[], None]) -> tuple[float, float]:
    return time_ms(run), peak_memory_mib(run)


def time_peer(shape: Shape, name: str, layer: Layer) -> list[Row]:
    """Forward alone, and forward with backward; a peer that refuses the shape gets a line that says so."""
    *leaves, d_out = inputs(shape)
    d_loss = torch.ones((), device="cuda")

    def forward() -> None:
        with torch.no_grad():
            layer(*leaves)

    def both() -> None:
        torch.autograd.grad(layer(*leaves), leaves, (d_out, d_loss, d_loss))

    rows = []
    for op, run, flop in (
        ("moe forward", forward, shape.forward_flop),
        ("moe forward and backward", both, 3 * shape.forward_flop),
    ):
        measured, note = attempt(partial(time_and_memory, run))
        if measured is None:
            rows.append(missing(op, shape.name, name, "TFLOP/s", note))
            continue
        ms, memory = measured
        rows.append(
            Row(
                op=op,
                shape=shape.name,
                peer=name,
                milliseconds=ms,
                rate=flop / ms / 1e9,
                rate_unit="TFLOP/s",
                peak_memory_mib=memory,
            )
        )
    return rows


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module's constant another value for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def tune(shape: Shape) -> Iterator[list[Row]]:
    """Time other tiles of each kernel that compile without spills, one kernel changed at a time."""
    from minicpm_kernels.moe import triton_gemm as moe_triton_gemm
    from minicpm_kernels.moe import triton_gemm_bwd as moe_triton_gemm_bwd
    from minicpm_kernels.moe.triton_gemm import Tiles

    def tiles(columns: int, depth: int, piece: int, warps: int, *stages: int) -> list[Tiles]:
        size = {"rows": 128, "columns": columns, "depth": depth, "piece": piece, "num_warps": warps}
        return [Tiles(**size, num_stages=number) for number in stages]

    candidates = (
        (moe_triton_gemm, "UP_TILES", [*tiles(128, 64, 64, 8, 3, 4), *tiles(128, 64, 32, 8, 4)]),
        (moe_triton_gemm, "ROWS_TILES", [*tiles(256, 64, 256, 8, 3, 4), *tiles(128, 64, 128, 8, 4)]),
        (
            moe_triton_gemm_bwd,
            "DOWN_BACKWARD_TILES",
            [
                *tiles(256, 64, 32, 8, 3, 4),
                *tiles(256, 64, 16, 8, 4),
                *tiles(128, 64, 32, 8, 3, 4),
                *tiles(128, 64, 8, 4, 3),
            ],
        ),
        (
            moe_triton_gemm_bwd,
            "GRADIENT_TILES",
            [*tiles(256, 64, 256, 8, 3, 5, 7), *tiles(128, 64, 128, 8, 7)],
        ),
        (moe_triton_gemm, "GROUP_ROWS", [4, 8, 16]),
    )
    for module, name, choices in candidates:
        for choice in choices:
            label = f"{name} = {choice}"
            with replaced(module, name, choice):
                _, fault = attempt(partial(check, shape))
                if fault:
                    yield [missing("moe", shape.name, label, "TFLOP/s", fault)]
                else:
                    yield time_peer(shape, label, ours(shape))


if __name__ == "__main__":
    run_benchmark("moe", SHAPES, check=check, peers=peers, time_peer=time_peer, tune=tune)
