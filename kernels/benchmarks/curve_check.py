"""A short real training run, with our kernels and on plain torch: do the loss curves agree?

Both train the same small model on the source text of Python's standard library, bytes as tokens, documents packed and
attention kept within each. In float32 the two curves may differ by rounding only. In bf16 the kernels' curve may
stray from the float32 one at most twice as far as plain torch's own bf16 curve does.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import GateError, require_cuda, write_json
from minicpm_kernels import choose_backend
from torch import Tensor

from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.transformer import MiniCPM

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1_280,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
)
ROW, NUM_ROWS, WARMUP = 2_048, 8, 20
END_OF_DOCUMENT = 256
# Nats, mean over the run. Two float32 runs that add in another order drift apart this slowly at this rate.
FLOAT32_TOLERANCE = 1e-3


def stream(num_tokens: int) -> Tensor:
    """The first bytes of the standard library's modules in alphabetical order, a mark after each."""
    tokens: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tokens += [*path.read_bytes(), END_OF_DOCUMENT]
        if len(tokens) >= num_tokens:
            break
    return torch.tensor((tokens * (num_tokens // len(tokens) + 1))[:num_tokens])


def batches(num_steps: int, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(input_ids_BT, targets_BT, cu_seqlens) of each step."""
    text = stream(num_steps * NUM_ROWS * ROW + 1)
    for step in range(num_steps):
        start = step * NUM_ROWS * ROW
        inputs = text[start : start + NUM_ROWS * ROW]
        targets = text[start + 1 : start + NUM_ROWS * ROW + 1].clone()
        targets[inputs == END_OF_DOCUMENT] = -100
        ends = torch.cat(
            [(inputs == END_OF_DOCUMENT).nonzero().flatten() + 1, torch.arange(0, len(inputs) + 1, ROW)]
        )
        cu_seqlens = ends.unique().int()
        yield (
            inputs.view(NUM_ROWS, ROW).to(device),
            targets.view(NUM_ROWS, ROW).to(device),
            cu_seqlens.to(device),
        )


def curve(*, kernels: bool, bf16: bool, num_steps: int, device: str) -> list[float]:
    """Cross-entropy of every step, in nats."""
    # Empty leaves the choice to each op: in float32 attention has no kernel, and says so when forced.
    os.environ["MINICPM_KERNELS"] = "" if kernels else "reference"
    with torch.device(device):
        model = MiniCPM(CONFIG)
    model.init_weights(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step, (input_ids_BT, targets_BT, cu_seqlens) in enumerate(batches(num_steps, device)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / WARMUP)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = model.loss(input_ids_BT, targets_BT, cu_seqlens=cu_seqlens, max_seqlen=ROW)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.total / loss.num_targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.cross_entropy / loss.num_targets)
    return torch.stack(losses).tolist()


def distance(first: list[float], second: list[float]) -> float:
    """Mean absolute difference of two curves."""
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    num_steps = parser.parse_args().steps
    require_cuda()
    backend = choose_backend(torch.empty(0, device="cuda"), "curve check")
    if backend.name != "triton":
        raise SystemExit(f"error: there are no kernels to check: {backend.reason}")
    curves: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name, kernels, bf16 in (
        ("torch fp32", False, False),
        ("kernels fp32", True, False),
        ("torch bf16", False, True),
        ("kernels bf16", True, True),
    ):
        start = time.perf_counter()
        curves[name] = curve(kernels=kernels, bf16=bf16, num_steps=num_steps, device="cuda")
        seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name:14} {curves[name][0]:.4f} -> {curves[name][-1]:.4f} in {seconds[name]} s")
        write_json("curve_check", {"complete": False, "seconds": seconds, "curves": curves})
    distances = {name: distance(values, curves["torch fp32"]) for name, values in curves.items()}
    allowed = {"kernels fp32": FLOAT32_TOLERANCE, "kernels bf16": 2 * distances["torch bf16"]}
    summary = {"complete": True, "distances": distances, "allowed": allowed}
    write_json("curve_check", {**summary, "seconds": seconds, "curves": curves})
    for name, limit in allowed.items():
        print(f"{name}: mean distance to torch fp32 {distances[name]:.2e} nats, allowed {limit:.2e}")
    strays = [name for name, limit in allowed.items() if not distances[name] <= limit]
    if strays:
        raise GateError(f"{' and '.join(strays)}: farther from torch fp32 than allowed")


if __name__ == "__main__":
    main()
