"""Attention over packed documents as callers see it, on the path that the device takes by default."""

from __future__ import annotations

import pytest
import torch
from minicpm_kernels import attention, attention_with_lse
from minicpm_kernels.attention.reference import attention_reference, attention_reference_backward
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OP = torch.ops.minicpm_kernels.attention.default


def _cu_seqlens(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def _inputs(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    merged = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, device=device)
    q, k, v = (x.detach().requires_grad_() for x in merged.split((heads, kv_heads, kv_heads), 1))
    return q, k, v, _cu_seqlens(lengths, device)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (36, 1)])
@pytest.mark.parametrize(
    "lengths", [[1], [63], [7, 7, 7], [1, 0, 63, 63, 30, 0], [0, 40, 0]], ids=lambda lengths: f"{lengths}"
)
def test_output_lse_and_gradients_match_the_reference(
    lengths: list[int], heads: int, kv_heads: int, window: int | None, device: torch.device
) -> None:
    q, k, v, cu_seqlens = _inputs(lengths, heads, kv_heads, 16, device)
    out, lse = attention_with_lse(q, k, v, cu_seqlens, max_seqlen=max(lengths), scale=0.3, window=window)
    exact, exact_lse = attention_reference(q, k, v, cu_seqlens, scale=0.3, window=window)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
    d_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    torch.testing.assert_close(gradients, torch.autograd.grad(exact, (q, k, v), d_out), rtol=1e-4, atol=1e-5)


def test_three_hundred_tiny_documents(device: torch.device) -> None:
    torch.manual_seed(1)
    lengths = torch.randint(0, 6, (300,)).tolist()
    q, k, v, cu_seqlens = _inputs(lengths, 3, 1, 16, device)
    out = attention(q, k, v, cu_seqlens, max_seqlen=5)
    exact, _ = attention_reference(q, k, v, cu_seqlens, scale=0.25, window=None)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


def test_a_document_is_blind_to_the_others(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([40, 50], 2, 2, 16, device)
    before = attention(q, k, v, cu_seqlens, max_seqlen=50)
    with torch.no_grad():
        for x in (q, k, v):
            x[:40].normal_()
    after = attention(q, k, v, cu_seqlens, max_seqlen=50)
    assert torch.equal(after[40:], before[40:])
    assert not torch.equal(after[:40], before[:40])


def test_no_tokens(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([0, 0], 2, 1, 16, device)
    out = attention(q, k, v, cu_seqlens, max_seqlen=0)
    out.sum().backward()
    assert out.shape == (0, 2, 16)
    assert q.grad is not None


@pytest.mark.parametrize("lengths", [[5, 0, 9], [0, 0]], ids=lambda lengths: f"{lengths}")
def test_reference_backward_is_that_of_the_default_path(lengths: list[int], device: torch.device) -> None:
    """It serves devices that have neither kernels nor torch's CPU op."""
    q, k, v, cu_seqlens = _inputs(lengths, 2, 1, 16, device)
    out = attention(q, k, v, cu_seqlens, max_seqlen=9, scale=0.3, window=4)
    d_out = torch.randn_like(out)
    gradients = attention_reference_backward(d_out, q, k, v, cu_seqlens, scale=0.3, window=4)
    torch.testing.assert_close(gradients, torch.autograd.grad(out, (q, k, v), d_out), rtol=1e-4, atol=1e-5)


def test_default_scale_is_that_of_torch(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([30], 2, 2, 16, device)
    own = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True
    )
    out = attention(q, k, v, cu_seqlens, max_seqlen=30)
    torch.testing.assert_close(out, own[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_gradient_of_a_sum(device: torch.device) -> None:
    """Its incoming gradient is one number expanded, with strides of zero."""
    q, k, v, cu_seqlens = _inputs([30, 31], 2, 1, 16, device)
    expanded = torch.autograd.grad(attention(q, k, v, cu_seqlens, max_seqlen=31).sum(), (q, k, v))
    out = attention(q, k, v, cu_seqlens, max_seqlen=31)
    torch.testing.assert_close(expanded, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


def test_opcheck(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([5, 0, 9], 2, 1, 16, device)
    torch.library.opcheck(OP, (q, k, v, cu_seqlens, 9, 0.25, 4, True))
    out, lse = (x.detach() for x in OP(q, k, v, cu_seqlens, 9, 0.25, 4, True))
    kept = (out, *(x.detach() for x in (q, k, v)), out, lse, cu_seqlens)
    torch.library.opcheck(torch.ops.minicpm_kernels.attention_backward.default, (*kept, 9, 0.25, 4, True))


def test_autocast_casts_the_inputs(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([5, 9], 2, 1, 16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = attention(q, k.bfloat16(), v, cu_seqlens, max_seqlen=9)
    narrow = attention(*(x.bfloat16() for x in (q, k, v)), cu_seqlens, max_seqlen=9)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, narrow)


def test_compiles_to_one_graph(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([20, 30], 2, 1, 16, device)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (attention(2 * q, k, v, cu_seqlens, max_seqlen=30) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected)


def test_activation_checkpointing(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([20, 30], 2, 1, 16, device)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(2 * q, k, v, cu_seqlens, max_seqlen=30)

    expected = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    out = checkpoint(block, q, k, v, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), expected)


def test_the_kept_lse_has_no_gradient(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([5], 2, 1, 16, device)
    _, lse = attention_with_lse(q, k, v, cu_seqlens, max_seqlen=5)
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 32)}, "q has 2 dimensions"),
        ({"k": torch.zeros(8, 2, 16, dtype=torch.float16)}, "k torch.float16"),
        ({"k": torch.zeros(7, 2, 16)}, r"k \(7, 2, 16\)"),
        ({"v": torch.zeros(8, 1, 16)}, "1 value heads"),
        ({"q": torch.zeros(8, 3, 16)}, "3 query, 2 key"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens is torch.int64"),
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, r"cu_seqlens is torch.int32 \(1,\)"),
        ({"scale": -1.0}, "scale=-1.0 must be positive"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"max_seqlen": -1}, "max_seqlen=-1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str, device: torch.device) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(8, 4, 16),
        "k": torch.zeros(8, 2, 16),
        "v": torch.zeros(8, 2, 16),
        "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32),
        "max_seqlen": 8,
    } | change
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    q, k, v, cu_seqlens = (arguments.pop(name) for name in ("q", "k", "v", "cu_seqlens"))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, cu_seqlens, **arguments)


@pytest.mark.parametrize("bounds", [[0, 7], [1, 8], [0, 5, 3, 8]])
def test_wrong_document_bounds_are_refused_on_the_cpu(bounds: list[int]) -> None:
    """On a card they are not looked at: that would wait for the device."""
    q, k, v, _ = _inputs([8], 2, 1, 16, torch.device("cpu"))
    with pytest.raises(ValueError, match="cu_seqlens must start with 0"):
        attention(q, k, v, torch.tensor(bounds, dtype=torch.int32), max_seqlen=8)
