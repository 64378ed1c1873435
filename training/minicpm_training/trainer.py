"""The training loop. One step reads top to bottom; everything that only watches is a callback."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minicpm_edge.errors import UserError
from minicpm_edge.model.transformer import MiniCPM
from minicpm_training.hardware import Precision, dtype_of
from minicpm_training.objectives.base import Batch, Dataloader, Objective
from minicpm_training.optimizer import Optimizer
from minicpm_training.parallel import process_group, sharding
from minicpm_training.schedule import Schedule


class NonFiniteLossError(UserError):
    """The loss or the gradient of a batch is infinite or not a number; the weights were not touched."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one step. ``loss`` is the objective's, a mean over targets, without auxiliary losses."""

    step: int  # steps done, this one included
    tokens: int  # seen since the run began
    loss: float
    others: Mapping[str, float]  # the objective's other metrics, means over targets
    lr: float
    grad_norm: float  # before clipping
    seconds: float
    num_tokens: int  # of this step
    stage: str


class Callback(Protocol):
    """Watches a training loop; must not change model, optimizer or random state."""

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None: ...

    def on_end(self, trainer: Trainer, *, finished: bool) -> None: ...


@dataclass(kw_only=True)
class Trainer:
    """A model, its optimizer and where it is. ``step`` counts the steps done."""

    model: MiniCPM
    optimizer: Optimizer
    objective: Objective
    dataloader: Dataloader
    schedule: Schedule
    peak_lr: float
    clip_norm: float
    precision: Precision
    step: int
    tokens: int
    callbacks: Sequence[Callback] = ()

    def run(self, until_step: int, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train up to ``until_step`` steps; False when ``should_stop`` ended it early."""
        self.model.train()
        while self.step < until_step and not should_stop():
            metrics = self.train_step()
            for callback in self.callbacks:
                callback.on_step(self, metrics)
        finished = self.step >= until_step
        for callback in self.callbacks:
            callback.on_end(self, finished=finished)
        return finished

    def train_step(self) -> StepMetrics:
        """One step: batch, forward, backward, clip, learning rate, optimizer.

        Raises:
            NonFiniteLossError: before the optimizer has changed anything.
        """
        start = time.perf_counter()
        micro_batches = self.dataloader(self.step)
        num_targets = max(1, process_group.all_reduce_sum(sum(batch.num_targets for batch in micro_batches)))

        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            with self.autocast():
                losses = self.objective(batch.to(self.device))
            torch.autograd.backward(losses.total / num_targets)
            for name, value in losses.metrics.items():
                sums[name] = sums[name] + value if name in sums else value

        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or math.inf)
        grad_norm = sharding.full_tensor(grad_norm)
        own = torch.stack([*(value / num_targets for value in sums.values()), grad_norm])
        *own_means, norm = own.tolist()  # the only sync
        means = {name: process_group.all_reduce_sum(mean) for name, mean in zip(sums, own_means, strict=True)}
        mean_loss = means.pop("loss")
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise NonFiniteLossError(self._describe_non_finite(mean_loss, norm, micro_batches))

        lr = self.peak_lr * self.schedule.multiplier(self.step)
        self.optimizer.set_learning_rate(lr)
        self.optimizer.step()

        num_tokens = process_group.all_reduce_sum(sum(batch.num_tokens for batch in micro_batches))
        stage = self.schedule.stage(self.step)
        self.step += 1
        self.tokens += num_tokens
        return StepMetrics(
            step=self.step,
            tokens=self.tokens,
            loss=mean_loss,
            others=means,
            lr=lr,
            grad_norm=norm,
            seconds=time.perf_counter() - start,
            num_tokens=num_tokens,
            stage=stage,
        )

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def autocast(self) -> torch.autocast:
        """The forward's arithmetic; weights and gradients stay float32."""
        return torch.autocast(
            self.device.type, dtype=dtype_of("bf16"), enabled=self.precision == "bf16", cache_enabled=True
        )

    def _describe_non_finite(self, loss: float, norm: float, batches: Sequence[Batch]) -> str:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        own_sequences = "; ".join(batch.describe() for batch in batches)
        sequences = "; ".join(process_group.all_gather_object(own_sequences))
        return (
            f"step {self.step + 1}: {what}, so the run stops before it changes the weights; batch: {sequences}. "
            "The last checkpoint is good: look at those sequences, or lower schedule.peak_lr, and resume"
        )
