"""Saving and restoring a training state: a Hugging Face folder plus optimizer.safetensors and state.json.

Batches are a pure function of the position, and the model draws no random numbers, so a step number and the
optimizer's tensors are the whole state.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint, save_checkpoint, verify_manifest, write_tensors
from minicpm_edge.model.transformer import MiniCPM
from minicpm_training.optimizer import Optimizer
from minicpm_training.parallel import process_group, sharding

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"


class TrainingState(BaseModel):
    """state.json: ``step`` steps done on ``tokens`` tokens; ``finished`` when the branch has reached its end."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    tokens: int
    stage: str
    finished: bool
    recipe_sha256: str


def save_state(
    folder: Path, model: MiniCPM, optimizer: Optimizer, state: TrainingState, *, tokenizer: Path | None
) -> None:
    """Write a checkpoint atomically; the master weights are in model.safetensors as float32.

    Of several processes all take part, and all wait until it is written.
    """
    sharding.reshard(model)
    model, tensors = sharding.full_model(model), sharding.full_tensors(optimizer.named_tensors())

    def write_extra_files(temporary: Path) -> None:
        write_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary / OPTIMIZER_FILE,
        )
        (temporary / STATE_FILE).write_text(
            state.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n"
        )

    if process_group.is_rank0():
        save_checkpoint(folder, model, tokenizer=tokenizer, extra_files=write_extra_files)
    process_group.barrier()


def read_state(folder: Path) -> TrainingState:
    """state.json of a checkpoint. Raises :class:`UserError` for a folder that training did not write."""
    try:
        return TrainingState.model_validate(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {STATE_FILE}: it is no checkpoint to resume from") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, RecursionError):
        raise UserError(
            f"{folder / STATE_FILE} is damaged; remove the folder to resume from an older one"
        ) from None


def load_model_for_training(folder: Path, *, device: torch.device) -> MiniCPM:
    """The float32 model of a checkpoint, its files checked against their hashes first."""
    process_group.broadcast_from_rank0(lambda: verify_manifest(folder))
    if process_group.world_size() == 1:
        return load_checkpoint(folder, device=device).train()
    model = load_checkpoint(folder).train()  # on the CPU: a GPU holds no more than this process's share
    sharding.shard(model, device)
    return model


def restore_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Restore the optimizer's tensors bit for bit."""
    file = folder / OPTIMIZER_FILE
    try:
        tensors = load_file(file)
    except (FileNotFoundError, SafetensorError):
        raise UserError(f"{file} is missing or damaged: this checkpoint cannot be resumed") from None
    optimizer.load_named_tensors(tensors)
