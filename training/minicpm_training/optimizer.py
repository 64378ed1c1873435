"""AdamW with one parameter group for each rule of width scaling (:mod:`minicpm_edge.model.mup`).

Master weights and moments are float32; the fused kernel updates each group in one pass where the device has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from minicpm_edge.errors import UserError
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.mup import EmbeddingRule, ParamGroup, group_of, param_groups
from minicpm_training.distributed import share_of
from minicpm_training.recipe.schema import OptimizerSection

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def build_optimizer(
    model: nn.Module,
    config: ModelConfig,
    settings: OptimizerSection,
    *,
    embedding_rule: EmbeddingRule = "input",
) -> AdamW:
    """AdamW over the model's parameters.

    Each group holds ``lr_multiplier`` (1/m for matrices, 1 for the others); :func:`set_learning_rate` applies it.
    Parameters named as norms have no weight decay.
    """
    table = param_groups(config, embedding_rule=embedding_rule)
    groups: dict[ParamGroup, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[table[group_of(name)]].append(parameter)
    device = next(model.parameters()).device.type
    return AdamW(
        [
            {
                "params": parameters,
                "lr_multiplier": rule.lr_multiplier,
                "weight_decay": settings.weight_decay if rule.weight_decay else 0.0,
            }
            for rule, parameters in groups.items()
        ],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=device in FUSED_DEVICES,
    )


def set_learning_rate(optimizer: AdamW, base_lr: float) -> None:
    """Give every group its share of the base rate."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * group["lr_multiplier"]


def optimizer_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """All optimizer state as named tensors: ``<parameter>.exp_avg``, ``.exp_avg_sq`` and ``.step``."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Restore what :func:`optimizer_tensors` gave, bit for bit.

    Raises :class:`UserError` where a tensor is missing or has another shape: the file is of another model.
    """
    for name, parameter in model.named_parameters():
        state: dict[str, Tensor] = {}
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensor = tensors.get(f"{name}.{key}")
            expected = parameter.shape if key != "step" else torch.Size([])
            if tensor is None or tensor.shape != expected:
                raise UserError(
                    f"optimizer.safetensors does not fit the model: {name}.{key} is missing or misshapen"
                )
            state[key] = (
                tensor.to(device=parameter.device, dtype=torch.float32)
                if key == "step"
                else share_of(tensor, parameter)
            )
        optimizer.state[parameter] = state
