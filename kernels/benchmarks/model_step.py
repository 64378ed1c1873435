"""A whole training step of the 1.2B and the 2.4B model at 4,096 tokens a row, with our kernels and without.

The peer is the same model on SDPA and torch.compile. A step is forward, backward, clipping and fused AdamW, weights in
float32 and products in bf16, as `minicpm-edge train` does it. MFU = (6·N + 12·L·d·T) · tokens a second over 989
TFLOP/s, N being the parameters without the embedding plus the head once.

Legend: N tokens, B rows, T tokens of a row, H heads, C head dim.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import torch
from common import BF16_PEAK_TFLOPS, Row, gate, report, require_cuda, time_ms
from minicpm_kernels.linear_cross_entropy import linear_cross_entropy_reference
from minicpm_kernels.rms_norm import rms_norm_reference, rms_norm_residual_reference
from minicpm_kernels.rope import rope_reference
from minicpm_kernels.swiglu import swiglu_reference
from torch import Tensor
from torch.nn import functional as F

from minicpm_edge.config import ModelConfig
from minicpm_edge.model import MiniCPM, count_parameters
from minicpm_edge.presets import preset

DEVICE = "cuda"
MODELS = ("minicpm-1.2b", "minicpm-2.4b")
ROW = 4_096
SMALL_CARD_GIB = 100  # below it, half the rows: float32 weights, moments and gradients of the 2.4B take 44 GB

Step = Callable[[], Tensor]


@contextmanager
def plain_torch() -> Iterator[None]:
    """The model's ops as torch alone has them: SDPA, and for the rest the definitions, which the compiler fuses."""

    def sdpa(q_NHC: Tensor, k_NHC: Tensor, v_NHC: Tensor, _cu_seqlens: Tensor, *, max_seqlen: int) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for x in (q_NHC, k_NHC, v_NHC))
        grouped = q_NHC.shape[1] != k_NHC.shape[1]
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            .transpose(1, 2)
            .flatten(0, 1)
        )

    with (
        mock.patch("minicpm_edge.attention.attention", sdpa),
        mock.patch("minicpm_edge.attention.rope", rope_reference),
        mock.patch("minicpm_edge.feed_forward.swiglu", swiglu_reference),
        mock.patch("minicpm_edge.model.rms_norm", rms_norm_reference),
        mock.patch("minicpm_edge.model.rms_norm_residual", rms_norm_residual_reference),
        mock.patch("minicpm_edge.model.linear_cross_entropy", linear_cross_entropy_reference),
    ):
        yield


def batch(config: ModelConfig, num_rows: int) -> tuple[Tensor, Tensor]:
    """Random tokens and the next ones."""
    tokens = torch.randint(0, config.vocab_size, (num_rows, ROW + 1), device=DEVICE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def training_step(model: MiniCPM, inputs: tuple[Tensor, Tensor], *, compiled: bool) -> Step:
    """One update of the model; returns the mean loss."""
    loss_of = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=DEVICE == "cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = loss_of(*inputs)
        mean = loss.total / loss.num_targets
        torch.autograd.backward(mean)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return mean.detach()

    return step


def check() -> None:
    """The gate: one layer of each width, loss and gradients of both models against float32 on plain torch."""
    for name in MODELS:
        config = replace(preset(name), num_hidden_layers=1, vocab_size=4_096)
        with torch.device(DEVICE):
            model = MiniCPM(config)
        model.init_weights(seed=0)
        inputs = batch(config, 1)

        def gradients(
            *, bf16: bool, model: MiniCPM = model, inputs: tuple[Tensor, Tensor] = inputs
        ) -> list[Tensor]:
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=bf16):
                loss = model.loss(*inputs)
            return [loss.cross_entropy, *torch.autograd.grad(loss.total, list(model.parameters()))]

        with plain_torch():
            exact, torch_own = gradients(bf16=False), gradients(bf16=True)
        # The loss is one number, whose error may happen to be nothing for either.
        gate(name, gradients(bf16=True), exact, torch_own, floor=5e-4)


def time_variant(config: ModelConfig, num_rows: int, *, kernels: bool, compiled: bool) -> tuple[float, float]:
    """(milliseconds of a step, peak memory in MiB)."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device(DEVICE):
        model = MiniCPM(config)
    model.init_weights(seed=0)
    step = training_step(model, batch(config, num_rows), compiled=compiled)
    with nullcontext() if kernels else plain_torch():
        milliseconds = time_ms(step, warmup=3, repeats=8)
    return milliseconds, torch.cuda.max_memory_allocated() / 2**20


def measure(name: str) -> list[Row]:
    """Time the step of each variant; one that runs out of memory gets a line that says so."""
    config = preset(name)
    num_rows = 2 if torch.cuda.get_device_properties(0).total_memory / 2**30 < SMALL_CARD_GIB else 4
    num_tokens = num_rows * ROW
    width = config.num_attention_heads * config.head_dim
    counted = count_parameters(config) + config.vocab_size * config.hidden_size
    flop = (6 * counted + 12 * config.num_hidden_layers * width * ROW) * num_tokens
    rows = []
    for peer, kernels, compiled in (
        ("ours, torch.compile", True, True),
        ("ours, eager", True, False),
        ("SDPA, torch.compile", False, True),
    ):
        try:
            milliseconds, memory = time_variant(config, num_rows, kernels=kernels, compiled=compiled)
        except torch.cuda.OutOfMemoryError:
            milliseconds, memory = None, None
        rows.append(
            Row(
                op=f"training step {name}",
                shape=f"{num_rows} x {ROW}",
                peer=peer,
                milliseconds=milliseconds,
                rate=100 * flop / milliseconds / 1e9 / BF16_PEAK_TFLOPS if milliseconds else None,
                rate_unit="% MFU",
                peak_memory_mib=memory,
                note=f"{num_tokens / milliseconds * 1e3:.0f} tokens/s" if milliseconds else "out of memory",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    arguments = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    check()
    rows: list[Row] = []
    for name in arguments.model or MODELS:
        rows += measure(name)
    report("model_step", rows, gate="passed")


if __name__ == "__main__":
    main()
