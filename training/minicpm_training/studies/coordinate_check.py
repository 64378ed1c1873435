"""Coordinate check: activations keep their size as the model widens, over the first steps of training.

The test of the width rules (:mod:`minicpm_edge.model.mup`): wrong rules blow activations up, or let them fade, with
width. ``python -m minicpm_training.studies.coordinate_check --out coordinate-check.png`` draws it.

Method: Yang et al., Tensor Programs V (arXiv 2203.03466), appendix D.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.mup import group_of, param_groups
from minicpm_edge.model.transformer import MiniCPM

WIDTHS = (64, 128, 256, 512)
VOCABULARY, LENGTH, BATCH = 256, 32, 8
WARMUP_LR = 0.002  # what the recipes' warm-up to 0.01 reaches in its first fifth

Sizes = dict[str, list[float]]  # activation name → its root mean square at each step


def _config(width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )


def _batches(num_steps: int) -> list[Tensor]:
    """Sequences with something to learn: each token is a fixed function of the one before, or random at 1 in 5."""
    generator = torch.Generator().manual_seed(0)
    follow_V = torch.randperm(VOCABULARY, generator=generator)
    batches = []
    for _ in range(num_steps):
        ids_BT = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        keep_BT = torch.rand(BATCH, LENGTH + 1, generator=generator) < 0.8
        for t in range(1, LENGTH + 1):
            ids_BT[:, t] = torch.where(keep_BT[:, t], follow_V[ids_BT[:, t - 1]], ids_BT[:, t])
        batches.append(ids_BT)
    return batches


def measure(
    width: int, *, num_steps: int, base_lr: float = WARMUP_LR, scaled: bool = True, seed: int = 0
) -> Sizes:
    """Train one width for a few steps and record the RMS of every block's output and of the final logits.

    ``scaled=False`` uses the same standard deviation and rate at all widths: what the rules are there to avoid.
    """
    config = _config(width)
    model = MiniCPM(config)
    model.init_weights(seed=seed)
    table = param_groups(config)
    base = param_groups(_config(WIDTHS[0]))
    groups = []
    for name, parameter in model.named_parameters():
        role = group_of(name)
        rule = table[role] if scaled else base[role]
        groups.append({"params": [parameter], "lr": base_lr * rule.lr_multiplier})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    sizes: Sizes = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sizes.setdefault(name, []).append(output.detach().float().square().mean().sqrt().item())

        return hook

    for index, layer in enumerate(model.layers):
        for part in ("attention", "feed_forward"):
            layer.get_submodule(part).register_forward_hook(record(f"layer {index} {part}"))
    for ids_BT in _batches(num_steps):
        loss = model.loss(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.total / loss.num_targets)
        optimizer.step()
    return sizes


def spread(by_width: Mapping[int, Sizes]) -> dict[str, float]:
    """For each activation the largest ratio, over the steps, between its sizes at any two widths, less one."""
    result = {}
    for name in next(iter(by_width.values())):
        columns = zip(*(sizes[name] for sizes in by_width.values()), strict=True)
        result[name] = max(max(column) / min(column) for column in columns) - 1.0
    return result


def plot(panels: Mapping[str, Mapping[int, Sizes]], out: Path) -> None:
    """One panel a set of rules: size against width at the last step, a line for each activation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (title, by_width) in zip(axes[0], panels.items(), strict=True):
        for name in next(iter(by_width.values())):
            axis.plot(
                list(by_width), [sizes[name][-1] for sizes in by_width.values()], marker="o", label=name
            )
        axis.set(title=title, xlabel="width", xscale="log", ylim=(0, None))
        axis.set_xticks(list(by_width), [str(width) for width in by_width])
        axis.minorticks_off()
    axes[0][0].set_ylabel("root mean square of the block's output")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both sets of rules and draw them side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("coordinate-check.png"))
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args(argv)
    panels = {
        "MiniCPM's rules": {w: measure(w, num_steps=arguments.steps) for w in WIDTHS},
        "one rate for all widths": {w: measure(w, num_steps=arguments.steps, scaled=False) for w in WIDTHS},
    }
    plot(panels, arguments.out)
    for title, by_width in panels.items():
        worst = max(spread(by_width).items(), key=lambda item: item[1])
        print(f"{title}: largest spread {worst[1]:.0%} ({worst[0]})")


if __name__ == "__main__":
    main()
