"""Attention forward and backward beside its peers, at MiniCPM's shapes; `--tune` times other tiles of our
kernels.

Every shape holds 16,384 tokens. Rates count the products of visible scores only: 4·D operations a score and
head forward, 2.5 times that backward, for every peer alike. Before anything is timed, outputs and gradients
at each shape must be as exact as torch's own, and deterministic gradients bit-equal; otherwise nothing is
reported.
"""

from __future__ import annotations

import inspect
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from common import GateError, Row, attempt, gate, missing, run_benchmark, time_ms
from minicpm_kernels import attention
from minicpm_kernels.attention.reference import attention_reference
from minicpm_kernels.backend import GLUON_VARIABLE
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

NUM_TOKENS = 16_384
ROW = 4_096

# Lengths in tokens (bytes / 4) of 30,221 technical documents of the Debian archive: their quantiles 0.025,
# 0.075, ... 0.975. Any such set has this shape, most documents short and most tokens in long ones.
DOCUMENT_QUANTILES = (
    119, 155, 196, 240, 286, 338, 402, 473, 553, 636, 729, 826, 945, 1095, 1315, 1628, 2113, 3020, 5209, 12081,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A batch of documents for one model."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def is_equal(self) -> bool:
        """Whether all documents have one length, so that peers without packing can take part."""
        return len(set(self.lengths)) == 1

    @property
    def forward_flop(self) -> float:
        scores = sum(length * (length + 1) / 2 for length in self.lengths)
        return 4 * self.head_dim * self.heads * scores


def equal(length: int) -> tuple[int, ...]:
    return (length,) * (NUM_TOKENS // length)


def packed() -> tuple[int, ...]:
    """Documents of that distribution, packed one after another and cut where a row of a training batch
    ends."""
    choose = random.Random(0)
    lengths: list[int] = []
    room = ROW
    while sum(lengths) < NUM_TOKENS:
        document = choose.choice(DOCUMENT_QUANTILES)
        while document and sum(lengths) < NUM_TOKENS:
            part = min(document, room)
            lengths.append(part)
            document -= part
            room = room - part or ROW
    return tuple(lengths)


SHAPES = (
    Shape(name="hd64 causal 4k", lengths=equal(4096), heads=36, kv_heads=36, head_dim=64),
    Shape(name="hd64 causal 8k", lengths=equal(8192), heads=36, kv_heads=36, head_dim=64),
    Shape(name="hd64 causal 4k, group 3", lengths=equal(4096), heads=24, kv_heads=8, head_dim=64),
    Shape(name="hd64 packed 16k", lengths=packed(), heads=36, kv_heads=36, head_dim=64),
    Shape(name="hd128 causal 8k", lengths=equal(8192), heads=16, kv_heads=16, head_dim=128),
)

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]
WITHOUT_GLUON = "ours, without Gluon"


def cu_seqlens_of(shape: Shape) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(shape.lengths)], dtype=torch.int32, device="cuda")


def ours(shape: Shape, *, deterministic: bool) -> Peer:
    cu_seqlens, longest = cu_seqlens_of(shape), max(shape.lengths)
    return lambda q, k, v: attention(q, k, v, cu_seqlens, max_seqlen=longest, deterministic=deterministic)


@contextmanager
def triton_alone() -> Iterator[None]:
    """Triton's kernels also where a call would choose those in Gluon."""
    with mock.patch.dict(os.environ, {GLUON_VARIABLE: "0"}):
        yield


def torch_sdpa(shape: Shape, backend: SDPBackend) -> Peer:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (len(shape.lengths), -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=shape.heads != shape.kv_heads
            )
        return out.transpose(1, 2).flatten(0, 1)

    return run


def flex(shape: Shape) -> Peer:
    """With the mask of the documents; making that mask is not timed."""

    @cache
    def prepared() -> tuple[Any, Any]:
        # Afresh for every shape: after eight of its kind the compiler would leave the op to its slow, plain form.
        torch.compiler.reset()
        cu_seqlens = cu_seqlens_of(shape)
        document = torch.repeat_interleave(torch.arange(len(shape.lengths), device="cuda"), cu_seqlens.diff())

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document[query] == document[key])

        mask = create_block_mask(visible, None, None, NUM_TOKENS, NUM_TOKENS, device="cuda")
        return torch.compile(flex_attention, dynamic=False), mask

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        compiled, mask = prepared()
        batch = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = compiled(*batch, block_mask=mask, enable_gqa=shape.heads != shape.kv_heads)[0]
        return out.transpose(0, 1)

    return run


def varlen(shape: Shape) -> Peer:
    cu_seqlens, longest = cu_seqlens_of(shape), max(shape.lengths)
    grouped = shape.heads != shape.kv_heads
    # torch 2.11 takes grouped heads without being told, and has no such argument.
    options: dict[str, Any] = (
        {"enable_gqa": grouped} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )
    run: Any = partial(varlen_attn, window_size=(-1, 0), **options)
    return lambda q, k, v: run(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def peers(shape: Shape) -> dict[str, Peer]:
    """Who is timed at a shape, ours first."""
    chosen = {
        "ours": ours(shape, deterministic=False),
        "ours, deterministic": ours(shape, deterministic=True),
        WITHOUT_GLUON: ours(shape, deterministic=False),
    }
    if shape.is_equal:
        chosen["torch cuDNN SDPA"] = torch_sdpa(shape, SDPBackend.CUDNN_ATTENTION)
        chosen["torch flash SDPA"] = torch_sdpa(shape, SDPBackend.FLASH_ATTENTION)
    return chosen | {"torch varlen_attn": varlen(shape), "torch flex_attention": flex(shape)}


def inputs(shape: Shape, *, group_limit: int | None = None) -> list[Tensor]:
    """Queries, keys, values as slices of one projection, as the model has them, and an output gradient."""
    torch.manual_seed(0)
    kv_heads = shape.kv_heads if group_limit is None else min(group_limit, shape.kv_heads)
    heads = kv_heads * (shape.heads // shape.kv_heads)
    merged = torch.randn(
        NUM_TOKENS, heads + 2 * kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16
    )
    q, k, v = (x.detach().requires_grad_() for x in merged.split((heads, kv_heads, kv_heads), 1))
    return [q, k, v, torch.randn(NUM_TOKENS, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)]


def results(peer: Peer, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the three gradients."""
    q, k, v, d_out = tensors
    out = peer(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out.to(out.dtype))]


def check(shape: Shape) -> None:
    """The gate, on two groups of heads: the float32 reference holds all scores of a document."""
    tensors = inputs(shape, group_limit=2)
    cu_seqlens = cu_seqlens_of(shape)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, cu_seqlens, scale=shape.head_dim**-0.5, window=None)[0]

    exact = results(reference, [x.detach().float().requires_grad_() for x in tensors])
    own = results(varlen(shape), tensors)
    for deterministic, gluon in itertools.product((False, True), (True, False)):
        with nullcontext() if gluon else triton_alone():
            found = results(ours(shape, deterministic=deterministic), tensors)
        gate(f"attention {shape.name}", found, exact, own)
    twice = [results(ours(shape, deterministic=True), tensors) for _ in range(2)]
    if not all(torch.equal(first, second) for first, second in zip(*twice, strict=True)):
        raise GateError(f"attention {shape.name}: deterministic gradients differ between two calls")


def time_peer(shape: Shape, name: str, peer: Peer) -> list[Row]:
    """Forward and backward; a peer that refuses the shape or is not built in gets a line that says so."""
    q, k, v, d_out = inputs(shape)

    def forward() -> float:
        return time_ms(lambda: peer(q.detach(), k.detach(), v.detach()))

    def backward() -> float:
        out = peer(q, k, v)
        return time_ms(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))

    rows = []
    for direction, timed, flop in (
        ("forward", forward, shape.forward_flop),
        ("backward", backward, 2.5 * shape.forward_flop),
    ):
        op, unit = f"attention {direction}", "TFLOP/s"
        with triton_alone() if name == WITHOUT_GLUON else nullcontext():
            ms, note = attempt(timed)
        if ms is None:
            rows.append(missing(op, shape.name, name, unit, note))
            continue
        rate = flop / ms / 1e9
        rows.append(
            Row(op=op, shape=shape.name, peer=name, milliseconds=ms, rate=rate, rate_unit=unit, note=note)
        )
    return rows


@contextmanager
def replaced(module: Any, name: str, tiles: Any) -> Iterator[None]:
    """Let a kernel's choice of tiles answer ``tiles`` for a while."""
    before = getattr(module, name)
    setattr(module, name, lambda *_: tiles)
    try:
        yield
    finally:
        setattr(module, name, before)


def tune(shape: Shape) -> Iterator[list[Row]]:
    """Time other tiles of each kernel that compile without spills, one kernel changed at a time."""
    from minicpm_kernels.attention import gluon_fwd as attention_gluon_fwd
    from minicpm_kernels.attention import triton_bwd as attention_triton_bwd
    from minicpm_kernels.attention import triton_fwd as attention_triton_fwd
    from minicpm_kernels.attention.schedule import Tiles

    def tiles(q: int, k: int, warps: int, stages: int, registers: int | None = None) -> Tiles:
        return Tiles(block_q=q, block_k=k, num_warps=warps, num_stages=stages, max_registers=registers)

    def gluon(consumers: int, stages: int, registers: int, overlap: bool) -> attention_gluon_fwd.GluonTiles:
        return attention_gluon_fwd.GluonTiles(
            consumers=consumers, stages=stages, registers=registers, overlap=overlap
        )

    forward, backward = attention_triton_fwd, attention_triton_bwd
    candidates: dict[int, list[tuple[Any, str, Sequence[Any]]]] = {
        64: [
            (attention_gluon_fwd, "gluon_tiles", [gluon(3, 4, 160, False), gluon(2, 4, 240, True)]),
            (attention_gluon_fwd, "gluon_tiles", [gluon(2, 4, 240, False)]),
            (forward, "forward_tiles", [tiles(128, 64, 4, s) for s in (2, 3, 4)]),
            (forward, "forward_tiles", [tiles(128, 64, 8, s) for s in (2, 3, 4)]),
            (forward, "forward_tiles", [tiles(128, 128, 8, s) for s in (2, 3)] + [tiles(64, 64, 4, 3)]),
            (backward, "dkdv_tiles", [tiles(64, 128, 8, s) for s in (1, 2, 3)] + [tiles(64, 64, 4, 2)]),
            (backward, "dq_tiles", [tiles(128, 64, 8, s, 128) for s in (2, 3)] + [tiles(128, 64, 8, 2)]),
        ],
        128: [
            (attention_gluon_fwd, "gluon_tiles", [gluon(2, 2, 240, overlap) for overlap in (True, False)]),
            (forward, "forward_tiles", [tiles(128, 128, 8, s) for s in (2, 3)]),
            (forward, "forward_tiles", [tiles(128, 64, 8, s) for s in (2, 3)] + [tiles(64, 64, 4, 3)]),
            (backward, "dkdv_tiles", [tiles(64, 128, 8, s) for s in (1, 2, 3)] + [tiles(64, 64, 4, 2)]),
            (backward, "dq_tiles", [tiles(128, 64, 8, s) for s in (1, 2, 3)]),
        ],
    }
    for module, name, choices in candidates[shape.head_dim]:
        for choice in choices:
            label = " ".join([name, *(f"{key}={value}" for key, value in vars(choice).items())])
            alone = nullcontext() if module is attention_gluon_fwd else triton_alone()
            with replaced(module, name, choice), alone:
                _, fault = attempt(partial(check, shape))
                if fault:
                    yield [missing("attention", shape.name, label, "TFLOP/s", fault)]
                    continue
                for deterministic in (False, True):
                    suffix = ", deterministic" if deterministic else ""
                    yield time_peer(shape, label + suffix, ours(shape, deterministic=deterministic))


if __name__ == "__main__":
    run_benchmark("attention", SHAPES, check=check, peers=peers, time_peer=time_peer, tune=tune)
