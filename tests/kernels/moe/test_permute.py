"""Sorting by expert on the device: the order, and the tiles that the grouped matmuls walk through."""

import pytest
import torch


def experts_of(num_tokens, top_k, num_experts, open_experts, device):
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, open_experts, generator=generator)
    assert num_experts >= open_experts
    return scores.topk(top_k, dim=-1).indices.int().to(device)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "open_experts"),
    [
        (1, 1, 4, 4),
        (63, 2, 8, 8),
        (1000, 2, 8, 3),  # several blocks of pairs, most experts empty
        (700, 3, 64, 64),  # more blocks than one step of the sum takes
        (130, 8, 64, 9),
        (50, 1, 1, 1),
        (40, 2, 100, 100),  # not a power of two
    ],
)
def test_order_and_tiles(
    num_tokens, top_k, num_experts, open_experts, device, triton_kernels, poisoned_memory
):
    from minicpm_kernels.moe.triton_permute import make_plan

    tile_rows = 32
    experts = experts_of(num_tokens, top_k, num_experts, open_experts, device)
    plan = make_plan(experts, num_experts, tile_rows)
    flat = experts.flatten().cpu()
    order = flat.argsort(stable=True)
    assert torch.equal(plan.pair_R.cpu().long(), order)
    assert torch.equal(plan.slot_NA.flatten().cpu().long(), order.argsort())
    counts = torch.bincount(flat, minlength=num_experts)
    ends = counts.cumsum(0)
    assert plan.start_E1.tolist() == [0, *ends.tolist()]

    expected = [
        [expert, row, int(ends[expert])]
        for expert in range(num_experts)
        for row in range(int(ends[expert] - counts[expert]), int(ends[expert]), tile_rows)
    ]
    assert plan.num_tiles_1.item() == len(expected) <= len(plan.tile_T3)
    assert plan.tile_T3[: len(expected)].tolist() == expected


@pytest.mark.parametrize("width", [16, 272])
@pytest.mark.parametrize("weighted", [True, False])
def test_combine(width, weighted, device, triton_kernels, poisoned_memory):
    from minicpm_kernels.moe.triton_permute import combine, make_plan

    experts = experts_of(21, 3, 5, 5, device)
    plan = make_plan(experts, 5, 128)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(63, width, generator=generator).to(device)
    weights = torch.rand(21, 3, generator=generator).to(device)
    expected = rows[plan.slot_NA.long()] * (weights[..., None] if weighted else 1)
    torch.testing.assert_close(combine(rows, plan, weights if weighted else None), expected.sum(1))


def test_an_id_between_the_experts_and_the_next_power_of_two_gets_no_slot(
    device, triton_kernels, poisoned_memory
):
    from minicpm_kernels.moe.triton_permute import make_plan

    plan = make_plan(torch.tensor([[4, 5], [6, 7], [0, 5]], dtype=torch.int32, device=device), 5, 32)
    assert plan.slot_NA.tolist() == [[1, -1], [-1, -1], [0, -1]]
    assert plan.start_E1.tolist() == [0, 1, 1, 1, 1, 2]
    assert plan.num_tiles_1.item() == 2


def test_an_id_out_of_range_gets_no_slot(device, triton_kernels, poisoned_memory):
    from minicpm_kernels.moe.triton_permute import make_plan

    plan = make_plan(torch.tensor([[1, 9], [-1, 0], [1, 0]], dtype=torch.int32, device=device), 2, 32)
    assert plan.slot_NA.tolist() == [[2, -1], [-1, 0], [3, 1]]
    assert plan.start_E1.tolist() == [0, 2, 4]
    assert plan.pair_R[:4].tolist() == [3, 5, 0, 4]
