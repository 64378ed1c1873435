"""The training loop. One step reads top to bottom; everything that only watches is a callback.

Legend: B batch rows, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.optim import AdamW

from minicpm_edge.errors import UserError
from minicpm_edge.model.transformer import MiniCPM
from minicpm_training import distributed
from minicpm_training.data.batches import Batch
from minicpm_training.hardware import Precision, dtype_of
from minicpm_training.objectives.pretrain import Objective
from minicpm_training.optimizer import set_learning_rate
from minicpm_training.schedule import Schedule

Feed = Callable[[int], list[Batch]]  # the micro-batches of an update, by its number


class NonFiniteLossError(UserError):
    """The loss or the gradient of a batch is infinite or not a number; the weights were not touched."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one update says. ``loss`` is the mean cross-entropy in nats a token, without auxiliary losses."""

    step: int  # updates done, this one included
    tokens: int  # tokens seen since the run began
    loss: float
    lr: float
    grad_norm: float  # before clipping
    seconds: float
    num_tokens: int  # of this update
    stage: str


class Callback(Protocol):
    """Watches a training loop; must not change model, optimizer or random state."""

    def on_step(self, trainer: Trainer, report: StepReport) -> None: ...

    def on_end(self, trainer: Trainer, *, finished: bool) -> None: ...


@dataclass(kw_only=True)
class Trainer:
    """A model, its optimizer and where it is. ``step`` counts the updates done."""

    model: MiniCPM
    optimizer: AdamW
    objective: Objective
    feed: Feed
    schedule: Schedule
    peak_lr: float
    clip_norm: float
    precision: Precision
    step: int
    tokens: int
    callbacks: Sequence[Callback] = ()

    def run(self, until_step: int, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train up to ``until_step`` updates; False when ``should_stop`` ended it early."""
        self.model.train()
        while self.step < until_step and not should_stop():
            report = self.train_step()
            for callback in self.callbacks:
                callback.on_step(self, report)
        finished = self.step >= until_step
        for callback in self.callbacks:
            callback.on_end(self, finished=finished)
        return finished

    def train_step(self) -> StepReport:
        """One update: batch, forward, backward, clip, schedule, step.

        Raises :class:`NonFiniteLossError` before the optimizer has changed anything.
        """
        start = time.perf_counter()
        micro_batches = self.feed(self.step)
        num_targets = max(1, distributed.total(sum(batch.num_targets for batch in micro_batches)))

        self.optimizer.zero_grad(set_to_none=True)
        cross_entropy = torch.zeros((), device=self.device)
        for batch in micro_batches:
            with self.autocast():
                loss = self.objective(batch.to(self.device))
            torch.autograd.backward(loss.total / num_targets)
            cross_entropy += loss.cross_entropy

        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or math.inf)
        grad_norm = distributed.whole(grad_norm)
        own_loss, norm = torch.stack([cross_entropy / num_targets, grad_norm]).tolist()  # the only sync
        mean_loss = distributed.total(own_loss)
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise NonFiniteLossError(self._describe_non_finite(mean_loss, norm, micro_batches))

        lr = self.peak_lr * self.schedule.multiplier(self.step)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()

        num_tokens = distributed.size() * sum(batch.input_ids_BT.numel() for batch in micro_batches)
        stage = self.schedule.stage(self.step)
        self.step += 1
        self.tokens += num_tokens
        return StepReport(
            step=self.step,
            tokens=self.tokens,
            loss=mean_loss,
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
        own_rows = "; ".join(batch.describe() for batch in batches)
        rows = "; ".join(distributed.collect(own_rows))
        return (
            f"update {self.step + 1}: {what}, so the run stops before it changes the weights; batch: {rows}. "
            "The last checkpoint is good: look at those rows, or lower schedule.peak_lr, and resume"
        )
