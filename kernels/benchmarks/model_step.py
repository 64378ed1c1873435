"""A whole training step of the 1.2B and the 2.4B model at 4,096 tokens a row, with our kernels and without.

The peer is the same model on SDPA and torch.compile. A step is forward, backward, clipping and fused AdamW, weights in
float32 and products in bf16, as `minicpm-edge train` does it. MFU = (6·N + 12·L·d·T) · tokens a second over 989
TFLOP/s, N being the parameters without the embedding plus the head once. A variant that runs out of memory tries half
the rows. Each model has a result file of its own.

Legend: N tokens, B rows, T tokens of a row, H heads, C head dim.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from common import BF16_PEAK_TFLOPS, Results, Row, attempt, gate, missing, require_cuda, time_ms
from minicpm_kernels.linear_cross_entropy import linear_cross_entropy_reference
from minicpm_kernels.rms_norm import rms_norm_reference, rms_norm_residual_reference
from minicpm_kernels.rope import rope_reference
from minicpm_kernels.swiglu import swiglu_reference
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.presets import preset
from minicpm_edge.model.transformer import Loss, MiniCPM, count_parameters

DEVICE = "cuda"
ROW = 4_096
# Rows of a step. In GB at 16 bytes a weight (itself, moments and gradient) and what forward keeps for backward, with
# gradients coming as that goes: 1.2B 22 + 11.5 a row, 2.4B 44 + 15 a row, and a few more for the loss.
ROWS = {"minicpm-1.2b": 4, "minicpm-2.4b": 4}
ROWS_SMALL_CARD = {"minicpm-1.2b": 4, "minicpm-2.4b": 2}
SMALL_CARD_GIB = 100

Step = Callable[[], Tensor]


@contextmanager
def plain_torch(*, cudnn: bool = False) -> Iterator[None]:
    """The model's ops as torch alone has them: SDPA, and for the rest the definitions, which the compiler fuses.

    SDPA chooses among its kernels by itself, or tries cuDNN's first.
    """

    def sdpa(q_NHC: Tensor, k_NHC: Tensor, v_NHC: Tensor, _cu_seqlens: Tensor, *, max_seqlen: int) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for x in (q_NHC, k_NHC, v_NHC))
        grouped = q_NHC.shape[1] != k_NHC.shape[1]
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            .transpose(1, 2)
            .flatten(0, 1)
        )

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with (
        sdpa_kernel(order, set_priority=True) if cudnn else nullcontext(),
        mock.patch("minicpm_edge.model.attention.attention", sdpa),
        mock.patch("minicpm_edge.model.attention.rope", rope_reference),
        mock.patch("minicpm_edge.model.mlp.swiglu", swiglu_reference),
        mock.patch("minicpm_edge.model.transformer.rms_norm", rms_norm_reference),
        mock.patch("minicpm_edge.model.transformer.rms_norm_residual", rms_norm_residual_reference),
        mock.patch("minicpm_edge.model.transformer.linear_cross_entropy", linear_cross_entropy_reference),
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


def check(name: str) -> None:
    """The gate: two layers of this width, loss and gradients against float32 on plain torch, compiled and not."""
    config = replace(preset(name), num_hidden_layers=2, vocab_size=4_096)
    with torch.device(DEVICE):
        model = MiniCPM(config)
    model.init_weights(seed=0)
    inputs = batch(config, 1)

    def gradients(loss_of: Callable[..., Loss], *, bf16: bool = True) -> list[Tensor]:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(*inputs)
        return [loss.cross_entropy, *torch.autograd.grad(loss.total, list(model.parameters()))]

    with plain_torch():
        exact, torch_own = gradients(model.loss, bf16=False), gradients(model.loss)
    compiled = torch.compile(model.loss, dynamic=False)
    for label, loss_of in (("eager", model.loss), ("compiled", compiled)):
        # The loss is one number, whose error may happen to be nothing for either.
        gate(f"{name}, {label}", gradients(loss_of), exact, torch_own, floor=5e-4)


def time_variant(config: ModelConfig, num_rows: int, variant: str) -> tuple[float, float, int]:
    """(milliseconds of a step, peak memory in MiB, graph breaks)."""
    ops, compiled = VARIANTS[variant]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device(DEVICE):
        model = MiniCPM(config)
    model.init_weights(seed=0)
    step = training_step(model, batch(config, num_rows), compiled=compiled)
    with ops():
        milliseconds = time_ms(step, warmup=3, repeats=8)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return milliseconds, torch.cuda.max_memory_allocated() / 2**20, breaks


# In which surroundings, and whether compiled.
VARIANTS: dict[str, tuple[Callable[[], AbstractContextManager[None]], bool]] = {
    "ours, torch.compile": (nullcontext, True),
    "cuDNN SDPA, torch.compile": (partial(plain_torch, cudnn=True), True),
    "ours, eager": (nullcontext, False),
    "SDPA, torch.compile": (plain_torch, True),
}


def measure(name: str) -> None:
    """Time the step of each variant."""
    config = preset(name)
    is_small = torch.cuda.get_device_properties(0).total_memory / 2**30 < SMALL_CARD_GIB
    width = config.num_attention_heads * config.head_dim
    counted = count_parameters(config) + config.vocab_size * config.hidden_size
    flop_of_token = 6 * counted + 12 * config.num_hidden_layers * width * ROW
    op, unit = f"training step {name}", "% MFU"
    results = Results(f"model_step_{name}", gate="passed")
    for variant in VARIANTS:
        num_rows = (ROWS_SMALL_CARD if is_small else ROWS)[name]
        note = "out of memory"
        while num_rows and note == "out of memory":
            shape, num_tokens = f"{num_rows} x {ROW}", num_rows * ROW
            measured, note = attempt(partial(time_variant, config, num_rows, variant))
            num_rows //= 2
            if measured is None:
                results.add(missing(op, shape, variant, unit, note))
                continue
            ms, memory, breaks = measured
            speed = f"{num_tokens / ms * 1e3:.0f} tokens/s"
            results.add(
                Row(
                    op=op,
                    shape=shape,
                    peer=variant,
                    milliseconds=ms,
                    rate=100 * flop_of_token * num_tokens / ms / 1e9 / BF16_PEAK_TFLOPS,
                    rate_unit=unit,
                    peak_memory_mib=memory,
                    note=f"{speed}, {breaks} graph breaks" if breaks else speed,
                )
            )
    results.finish()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(ROWS), action="append", help="default: both")
    arguments = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    for name in arguments.model or ROWS:
        check(name)
        measure(name)


if __name__ == "__main__":
    main()
