"""The router on both backends: what it chooses, its losses, its gradient."""

from functools import partial

import pytest
import torch
from minicpm_kernels import moe_router


def router_torch(logits, top_k):
    """The same by torch's own ops: softmax, topk, renormalise."""
    probabilities = logits.softmax(-1)
    top, experts = probabilities.topk(top_k, dim=-1)
    num_experts = logits.shape[1]
    fraction = torch.nn.functional.one_hot(experts, num_experts).to(logits.dtype).mean((0, 1))
    load_balance = num_experts * (fraction * probabilities.mean(0)).sum()
    return top / top.sum(-1, keepdim=True), load_balance, logits.logsumexp(-1).square().mean()


def differentiable(top_k):
    """The router without its integers, as with_gradients wants it."""

    def run(logits):
        routing = moe_router(logits, top_k)
        return routing.weights_NA, routing.load_balance_loss, routing.z_loss

    return run


def logits_of(num_tokens, num_experts, device, scale=1.0):
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    return (scale * torch.randn(num_tokens, num_experts, generator=generator)).to(device)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 4, 1), (63, 8, 2), (130, 64, 8), (70, 5, 3), (9, 2, 2)]
)
def test_outputs_and_gradient(
    num_tokens, num_experts, top_k, scale, device, backend, poisoned_memory, with_gradients
):
    inputs = (logits_of(num_tokens, num_experts, device, scale),)
    by_torch = partial(router_torch, top_k=top_k)
    results = (
        with_gradients(differentiable(top_k), inputs),
        with_gradients(by_torch, inputs),
        with_gradients(by_torch, inputs, dtype=torch.float64),
    )
    for what, ours, own, exact in zip(("weights", "load balance", "z", "d_logits"), *results, strict=True):
        # Twice torch's error, or four roundings where torch happens to hit the mark: all of this is float32.
        rounding = torch.finfo(torch.float32).eps * max(exact.abs().max().item(), 1e-3)
        allowed = max(2 * (own - exact).abs().max().item(), 4 * rounding)
        assert (ours - exact).abs().max().item() <= allowed, what


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (8, 2), (64, 8), (3, 3)])
def test_chooses_the_largest_and_the_lower_of_equals(num_experts, top_k, device, backend, poisoned_memory):
    logits = logits_of(150, num_experts, device).round(decimals=0)  # full of ties
    routing = moe_router(logits, top_k)
    expected = logits.cpu().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert routing.experts_NA.dtype == torch.int32
    assert torch.equal(routing.experts_NA.cpu().long(), expected)


def test_minus_zero_infinity_and_a_forbidden_expert(device, backend, poisoned_memory):
    infinity = float("inf")
    logits = torch.tensor([[-0.0, 0.0, -1.0], [-infinity, 3.0, -infinity]], device=device)
    routing = moe_router(logits, 2)
    assert routing.experts_NA.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(
        routing.weights_NA, torch.tensor([[0.5, 0.5], [1.0, 0.0]], device=device), rtol=0, atol=0
    )


def test_balanced_routing_costs_one_and_collapse_costs_all(device, backend):
    balanced = 20.0 * torch.eye(8, device=device).repeat(4, 1)
    assert moe_router(balanced, 1).load_balance_loss.item() == pytest.approx(1.0)
    collapsed = 20.0 * torch.eye(8, device=device)[:1].repeat(32, 1)
    assert moe_router(collapsed, 1).load_balance_loss.item() == pytest.approx(8.0, rel=1e-5)


def test_no_tokens(device, backend, with_gradients):
    weights, load_balance, z, d_logits = with_gradients(
        differentiable(2), (torch.empty(0, 8, device=device),)
    )
    assert weights.shape == (0, 2)
    assert d_logits.shape == (0, 8)
    assert load_balance.item() == z.item() == 0.0


def test_bits_repeat_and_strides_do_not_matter(device, backend, with_gradients):
    logits = logits_of(200, 8, device)
    first, second = (with_gradients(differentiable(2), (logits,)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    strided = with_gradients(differentiable(2), (logits.t().contiguous().t(),))
    torch.testing.assert_close(strided, first)


def test_gradient_of_one_output_alone(device, backend):
    """Outputs that the loss does not use must count as zero."""
    logits = logits_of(40, 8, device).requires_grad_()
    (alone,) = torch.autograd.grad(moe_router(logits, 2).z_loss, logits)
    (expected,) = torch.autograd.grad(logits.logsumexp(-1).square().mean(), logits)
    torch.testing.assert_close(alone, expected)


def test_whole_graph_compiles(device, backend, with_gradients):
    inputs = (logits_of(50, 8, device),)
    compiled = torch.compile(differentiable(2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        with_gradients(compiled, inputs), with_gradients(differentiable(2), inputs), rtol=0, atol=0
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_inductor_adds_all_three_gradients(device, monkeypatch, with_gradients):
    """With a scatter in the backward, inductor's CPU code lost the weights' part of the sum (torch 2.13)."""
    monkeypatch.setenv("MINICPM_KERNELS", "reference")
    inputs = (logits_of(13, 4, device),)
    compiled = torch.compile(differentiable(2), fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, inputs), with_gradients(differentiable(2), inputs))


def test_gradcheck_of_the_reference(monkeypatch):
    monkeypatch.setenv("MINICPM_KERNELS", "reference")
    logits = logits_of(7, 5, "cpu").double().requires_grad_()
    assert torch.autograd.gradcheck(differentiable(3), (logits,))


def test_opcheck(device, triton_kernels):
    from minicpm_kernels.moe import op as moe_ops

    logits = logits_of(20, 8, device)
    torch.library.opcheck(moe_ops.router_op, (logits.requires_grad_(), 2))
    weights, experts, load_balance, z, fraction = (x.detach() for x in moe_ops.router_op(logits.detach(), 2))
    torch.library.opcheck(
        moe_ops.router_backward_op,
        (logits.detach(), weights, experts, fraction, torch.ones_like(weights), load_balance, z),
    )


@pytest.mark.parametrize(
    ("logits", "top_k", "error", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.bfloat16), 2, TypeError, "must be float32"),
        (torch.zeros(4), 1, ValueError, r"must have shape \(N, E\)"),
        (torch.zeros(3, 4), 5, ValueError, "1 to 4 .* not 5"),
        (torch.zeros(3, 4), 0, ValueError, "1 to 4 .* not 0"),
    ],
)
def test_refuses(logits, top_k, error, message):
    with pytest.raises(error, match=message):
        moe_router(logits, top_k)
