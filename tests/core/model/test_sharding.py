"""The model sharded over two processes (FSDP2), its layers recomputed in backward: the numbers of one process."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.transformer import MiniCPM

DENSE = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
CONFIGS = {
    "dense": DENSE,
    "untied": dataclasses.replace(DENSE, tie_word_embeddings=False),
    "experts": dataclasses.replace(DENSE, num_experts=4, num_experts_per_tok=2),
}
PROCESSES = 2


def batch():
    """One row of two documents for each process."""
    ids_BT = torch.randint(0, DENSE.vocab_size, (PROCESSES, 25), generator=torch.Generator().manual_seed(1))
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()


def loss_of_row(model, row):
    ids_BT, targets_BT = batch()
    cu_seqlens = torch.tensor([0, 10, 24], dtype=torch.int32)
    loss = model.loss(ids_BT[row : row + 1], targets_BT[row : row + 1], cu_seqlens=cu_seqlens, z_loss=1e-4)
    return loss.total / loss.num_targets


def gradients_of_one_process(config):
    model = MiniCPM(config)
    model.init_weights(seed=0)
    losses = [loss_of_row(model, row) for row in range(PROCESSES)]
    (sum(losses) / PROCESSES).backward()
    return [loss.item() for loss in losses], {name: p.grad for name, p in model.named_parameters()}


def train_sharded(rank, config, folder):
    """What each process runs: one backward of its own row; the gathered gradients go to a file."""
    if os.environ["MINICPM_KERNELS"] == "triton":
        from minicpm_kernels_testing.interpreter import patch_interpreter

        patch_interpreter()
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    model = MiniCPM(config)
    model.init_weights(seed=0)
    for index, layer in enumerate(model.layers):
        model.layers[index] = fully_shard(checkpoint_wrapper(layer))
    fully_shard(model)
    register_fsdp_forward_method(model, "loss")
    loss = loss_of_row(model, rank)
    loss.backward()
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad.full_tensor()
        for name, p in model.named_parameters()
    }
    torch.save((loss.item(), gradients), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernels"), [*((name, "reference") for name in CONFIGS), ("experts", "triton")]
)
def test_sharded_gradients_are_those_of_one_process(name, kernels, tmp_path):
    if kernels == "triton":
        pytest.importorskip("triton")
    losses, expected = gradients_of_one_process(CONFIGS[name])
    environment = os.environ | {"MINICPM_KERNELS": kernels, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), name, str(tmp_path)], env=environment)
        for rank in range(PROCESSES)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * PROCESSES
    for rank in range(PROCESSES):
        loss, gradients = torch.load(tmp_path / f"{rank}.pt")
        assert loss == pytest.approx(losses[rank], rel=1e-5)
        assert gradients.keys() == expected.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    train_sharded(int(sys.argv[1]), CONFIGS[sys.argv[2]], sys.argv[3])
    # As the product leaves: gloo's threads let go of tensors late, which while the interpreter is taken down aborts it.
    os._exit(0)
