"""Optimizers with one parameter group for each rule of width scaling (:mod:`minicpm_edge.model.mup`).

Master weights and state are float32. The trainer and the checkpoints know an optimizer by what :class:`Optimizer`
promises: its state is named tensors, whatever it keeps of each parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from minicpm_edge.errors import UserError
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.mup import EmbeddingRule, ParamGroup, group_of, param_groups
from minicpm_training.parallel.sharding import distribute_like
from minicpm_training.recipe.sections import OptimizerSection

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Optimizer(Protocol):
    """What is asked of an optimizer."""

    def set_learning_rate(self, base_lr: float) -> None:
        """Give every parameter its share of the base learning rate."""
        ...

    def zero_grad(self) -> None:
        """Drop the gradients."""
        ...

    def step(self) -> None:
        """Change the weights by their gradients."""
        ...

    def named_tensors(self) -> dict[str, Tensor]:
        """All state, as ``<parameter>.<key>``; empty before the first step."""
        ...

    def load_named_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`named_tensors` gave, bit for bit.

        Raises:
            UserError: where a tensor is missing or has another shape: it is of another model or optimizer.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TorchOptimizer:
    """One or several of torch's optimizers, each over parameters of its own, as one.

    Groups of parameters hold ``lr_multiplier``. ``state_keys`` names what torch keeps of each parameter, by optimizer:
    a tensor of the parameter's shape, or a scalar.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    state_keys: Sequence[tuple[str, ...]]
    names: Mapping[Tensor, str]

    def set_learning_rate(self, base_lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base_lr * group["lr_multiplier"]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def named_tensors(self) -> dict[str, Tensor]:
        return {
            f"{self.names[parameter]}.{key}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_named_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for optimizer, keys in zip(self.optimizers, self.state_keys, strict=True):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self.names[parameter]
                    optimizer.state[parameter] = {
                        key: _restored(f"{name}.{key}", tensors, parameter) for key in keys
                    }


def _restored(name: str, tensors: Mapping[str, Tensor], parameter: nn.Parameter) -> Tensor:
    tensor = tensors.get(name)
    if tensor is not None and tensor.shape == parameter.shape:
        return distribute_like(tensor, parameter)
    if tensor is not None and tensor.dim() == 0:  # torch's count of steps
        return tensor.to(device=parameter.device, dtype=torch.float32)
    raise UserError(f"optimizer.safetensors does not fit the model: {name} is missing or misshapen")


def build_optimizer(
    model: nn.Module,
    config: ModelConfig,
    settings: OptimizerSection,
    *,
    embedding_rule: EmbeddingRule = "input",
) -> Optimizer:
    """The optimizer that ``settings.kind`` names, over the model's parameters.

    Each group's learning rate is the base one times its multiplier (1/m for matrices, 1 for the others). Parameters
    named as norms have no weight decay.
    """
    return OPTIMIZERS[settings.kind](model, config, settings, embedding_rule)


def _adamw(
    model: nn.Module, config: ModelConfig, settings: OptimizerSection, embedding_rule: EmbeddingRule
) -> TorchOptimizer:
    """AdamW; the fused kernel updates each group in one pass where the device has it."""
    adamw = torch.optim.AdamW(
        grouped_parameters(model, config, settings, embedding_rule),
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=next(model.parameters()).device.type in FUSED_DEVICES,
    )
    return TorchOptimizer(
        optimizers=[adamw],
        state_keys=[("exp_avg", "exp_avg_sq", "step")],
        names={parameter: name for name, parameter in model.named_parameters()},
    )


def grouped_parameters(
    model: nn.Module, config: ModelConfig, settings: OptimizerSection, embedding_rule: EmbeddingRule
) -> list[dict[str, object]]:
    """torch's parameter groups, one for each rule of width scaling, with ``lr_multiplier`` and ``weight_decay``."""
    table = param_groups(config, embedding_rule=embedding_rule)
    groups: dict[ParamGroup, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[table[group_of(name)]].append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": rule.lr_multiplier,
            "weight_decay": settings.weight_decay if rule.weight_decay else 0.0,
        }
        for rule, parameters in groups.items()
    ]


OptimizerKind = Callable[[nn.Module, ModelConfig, OptimizerSection, EmbeddingRule], Optimizer]
OPTIMIZERS: dict[str, OptimizerKind] = {"adamw": _adamw}
