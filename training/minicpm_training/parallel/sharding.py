"""The sharded model (FSDP2): each rank keeps its shard of every parameter, gradient and optimizer tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minicpm_edge.model.transformer import MiniCPM
from minicpm_training.parallel.process_group import is_rank0, world_size


def shard(model: MiniCPM, device: torch.device) -> None:
    """Leave this rank its shard of every parameter; a layer is whole only while it computes.

    Gradients are summed over the ranks, as they are over micro-batches.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    # Kept whole between forward and backward: FSDP gathers again where an output tensor's gradient comes, and a Loss
    # is no tensor.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def reshard(model: MiniCPM) -> None:
    """Free what a forward without a backward left gathered: only then are the model's parameters its shards."""
    if world_size() > 1:
        model.reshard()  # type: ignore[operator]  # of FSDPModule


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every rank; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every rank has, sharded as ``parameter`` is and on its device; whole where that is."""
    tensor = tensor.to(device=parameter.device, dtype=parameter.dtype)
    if world_size() > 1:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            # Without a source rank: each takes its shard of its own copy, and nothing is sent.
            return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def full_model(model: MiniCPM) -> MiniCPM:
    """A sharded model, whole and on the CPU of rank 0; on the other ranks its parameters stay on meta."""
    if world_size() == 1:
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    with torch.device("meta"):
        full = MiniCPM(model.config)
    if is_rank0():
        full.load_state_dict(state, assign=True)
    return full


def full_tensors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Sharded tensors by name, whole and on the CPU of rank 0; empty on the other ranks.

    (``get_optimizer_state_dict`` takes a step with an optimizer that has not taken one.)
    """
    if world_size() == 1:
        return tensors
    full = {}
    for name, tensor in tensors.items():  # one at a time: a GPU has room for that
        gathered = full_tensor(tensor.detach())
        full[name] = gathered.cpu() if is_rank0() else torch.empty(0)
    return full
