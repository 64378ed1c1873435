"""Callbacks of the training loop: metrics and progress, checkpoints, validation, samples, the plot, TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minicpm_edge.cli.progress import Progress, duration
from minicpm_training.run import Branch
from minicpm_training.trainer import StepMetrics, Trainer

SMOOTHING = 0.9  # of the moving average behind the time left


@dataclass(kw_only=True)
class Metrics:
    """One line of metrics.jsonl every ``every`` steps, and the progress line.

    ``mfu`` is the share of the machine's peak FLOP/s spent on the model's own arithmetic.
    """

    branch: Branch
    progress: Progress
    every: int
    until_step: int
    flops_per_token: Callable[[int], float]  # by the number of a step
    peak_flops: float
    sinks: tuple[Callable[[Mapping[str, Any]], None], ...] = ()
    _seconds_per_step: float = field(default=0.0, init=False)

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        tokens_per_second = metrics.num_tokens / metrics.seconds
        previous = self._seconds_per_step or metrics.seconds
        self._seconds_per_step = SMOOTHING * previous + (1 - SMOOTHING) * metrics.seconds
        if metrics.step % self.every == 0 or metrics.step == self.until_step:
            line = {
                "step": metrics.step,
                "tokens": metrics.tokens,
                "loss": metrics.loss,
                **metrics.others,
                "lr": metrics.lr,
                "grad_norm": metrics.grad_norm,
                "tokens_per_second": round(tokens_per_second, 1),
                "mfu": round(tokens_per_second * self.flops_per_token(metrics.step - 1) / self.peak_flops, 4),
                "stage": metrics.stage,
            }
            self.branch.append_metrics(line)
            for sink in self.sinks:
                sink(line)
        left = duration((self.until_step - metrics.step) * self._seconds_per_step)
        self.progress.update(
            f"step {metrics.step}/{self.until_step}  {metrics.stage}  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  "
            f"{tokens_per_second:,.0f} tokens/s  {left} left"
        )

    def on_end(self, trainer: Trainer, *, finished: bool) -> None:
        self.progress.finish()


@dataclass(kw_only=True)
class PeriodicCallback:
    """Does something every ``every`` steps (0: never) and once when the loop ends.

    ``when_stopped`` says whether an end before the last step counts: a checkpoint then is worth its time,
    an evaluation is not.
    """

    action: Callable[[Trainer], None]
    every: int
    when_stopped: bool = False
    _done_at: int = field(default=-1, init=False)

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.every and metrics.step % self.every == 0:
            self._act(trainer)

    def on_end(self, trainer: Trainer, *, finished: bool) -> None:
        if finished or self.when_stopped:
            self._act(trainer)

    def _act(self, trainer: Trainer) -> None:
        if self._done_at != trainer.step:
            self._done_at = trainer.step
            self.action(trainer)


class TensorBoard:
    """Writes metrics as TensorBoard scalars; needs the ``tensorboard`` package."""

    def __init__(self, branch: Branch) -> None:
        from minicpm_edge.errors import UserError

        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard needs the package 'tensorboard': pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(branch.folder / "tensorboard"))

    def __call__(self, line: Mapping[str, Any]) -> None:
        for key, value in line.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(key, value, line["step"])
        self._writer.flush()
