"""The attention kernels: interpreted on a machine without a GPU, compiled on one with it
(benchmarks/gpu.sh)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from minicpm_kernels import attention, attention_with_lse
from minicpm_kernels.attention.op import attention_backend
from minicpm_kernels.attention.reference import attention_reference
from minicpm_kernels.backend import GLUON_VARIABLE
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
import triton
import triton.language as tl
from minicpm_kernels.attention.schedule import attention_bounds, head_and_tile

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory", "no_gluon")


@pytest.fixture
def no_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper card would run those kernels, which test_gluon_fwd.py and test_gluon_bwd.py are for."""
    monkeypatch.setenv(GLUON_VARIABLE, "0")


@triton.jit
def _visit_kernel(p_seen, num_heads, num_tiles, heads_per_section):
    head, tile = head_and_tile(num_heads, num_tiles, heads_per_section)
    tl.atomic_add(p_seen + head * num_tiles + tile, 1)


def _cu_seqlens(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def _inputs(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    size: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slices of one merged projection, as the model has them: rows are not contiguous."""
    torch.manual_seed(0)
    merged = size * torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, device=device)
    q, k, v = (x.detach().requires_grad_() for x in merged.to(dtype).split((heads, kv_heads, kv_heads), 1))
    return q, k, v, _cu_seqlens(lengths, device)


def _torch_own(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """torch's scaled_dot_product_attention in the same precision, one document after another."""
    outputs = []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False):
        if end == start:
            continue
        mask = None
        if window is not None:
            mask = (
                torch.ones(end - start, end - start, dtype=torch.bool, device=q.device)
                .tril()
                .triu(1 - window)
            )
        batch = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _check(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    assert_as_accurate: Callable[..., None],
    *,
    window: int | None = None,
    deterministic: bool = True,
) -> None:
    """Output, log-sum-exp and gradients against the float32 reference and against torch's own error."""
    q, k, v, cu_seqlens = inputs
    assert attention_backend(q).name == "triton"
    max_seqlen = int(cu_seqlens.diff().max())
    out, lse = attention_with_lse(
        q, k, v, cu_seqlens, max_seqlen=max_seqlen, window=window, deterministic=deterministic
    )
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    exact, exact_lse = attention_reference(*wide, cu_seqlens, scale=q.shape[2] ** -0.5, window=window)
    own = _torch_own(q, k, v, cu_seqlens, window)
    assert_as_accurate(out, own, exact)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
    d_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    own_gradients = torch.autograd.grad(own, (q, k, v), d_out)
    exact_gradients = torch.autograd.grad(exact, wide, d_out.float())
    # The gradient of the scores is a difference of two numbers of this size; alone in its document, a token
    # has none.
    floor = 1e-6 * max(float(x.detach().abs().max()) for x in (q, k, v)) ** 2
    for what, ours, theirs, reference in zip("qkv", gradients, own_gradients, exact_gradients, strict=True):
        assert_as_accurate(ours, theirs, reference, floor=floor, what=f"gradient of {what}")


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "lengths", [[1], [63], [300], [1, 63, 100, 0, 0, 130]], ids=lambda lengths: f"{lengths}"
)
def test_as_accurate_as_torch(
    lengths: list[int],
    head_dim: int,
    deterministic: bool,
    device: torch.device,
    assert_as_accurate: Callable[..., None],
) -> None:
    inputs = _inputs(lengths, 2, 2, head_dim, torch.bfloat16, device)
    _check(inputs, assert_as_accurate, deterministic=deterministic)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("heads", [3, 36])
def test_grouped_heads(
    heads: int, deterministic: bool, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    inputs = _inputs([20, 45], heads, 1, 64, torch.bfloat16, device)
    _check(inputs, assert_as_accurate, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [[50], [128, 40], [128, 64], [129, 64]], ids=lambda lengths: f"{lengths}")
def test_several_groups_of_heads_whose_tokens_end_within_a_tile(
    lengths: list[int],
    head_dim: int,
    deterministic: bool,
    device: torch.device,
    assert_as_accurate: Callable[..., None],
) -> None:
    """A tile of keys walks the heads of its own group only, even where its last queries do not exist."""
    inputs = _inputs(lengths, 4, 2, head_dim, torch.bfloat16, device)
    _check(inputs, assert_as_accurate, deterministic=deterministic)


def test_a_thousand_tokens(device: torch.device, assert_as_accurate: Callable[..., None]) -> None:
    _check(_inputs([1000], 1, 1, 64, torch.float16, device), assert_as_accurate)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("window", [1, 50, 128, 10_000])
def test_sliding_window(
    window: int, deterministic: bool, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    inputs = _inputs([260, 40, 100], 2, 1, 64, torch.bfloat16, device)
    _check(inputs, assert_as_accurate, window=window, deterministic=deterministic)


def test_three_hundred_tiny_documents(device: torch.device, assert_as_accurate: Callable[..., None]) -> None:
    torch.manual_seed(1)
    lengths = torch.randint(0, 4, (300,)).tolist()
    _check(_inputs(lengths, 2, 1, 64, torch.bfloat16, device), assert_as_accurate)


@pytest.mark.parametrize("head_dim", [16, 32])
def test_small_head_dims(
    head_dim: int, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    _check(_inputs([50, 90], 2, 1, head_dim, torch.bfloat16, device), assert_as_accurate, deterministic=False)


@pytest.mark.parametrize("size", [1e-3, 1e2])
def test_tiny_and_huge_inputs(
    size: float, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    _check(_inputs([150], 2, 1, 64, torch.bfloat16, device, size), assert_as_accurate)


@pytest.mark.parametrize("deterministic", [True, False])
def test_two_calls_are_bit_equal(deterministic: bool, device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([150, 90], 4, 2, 64, torch.bfloat16, device)
    results = []
    for _ in range(2):
        out = attention(q, k, v, cu_seqlens, max_seqlen=200, deterministic=deterministic)
        results.append((out, *torch.autograd.grad((out.float() ** 2).sum(), (q, k, v))))
    (first_out, first_dq, *first_dkv), (second_out, second_dq, *second_dkv) = results
    assert torch.equal(first_out, second_out)
    assert all(torch.equal(first, second) for first, second in zip(first_dkv, second_dkv, strict=True))
    if deterministic:  # without, only dQ may differ
        assert torch.equal(first_dq, second_dq)


@pytest.mark.parametrize("deterministic", [True, False])
def test_far_documents_are_not_even_loaded(deterministic: bool, device: torch.device) -> None:
    """A masked-out NaN would still spoil a product, so the finite results show that no block of it was
    read."""
    q, k, v, cu_seqlens = _inputs([256, 128, 256], 2, 1, 64, torch.bfloat16, device)
    with torch.no_grad():
        for x in (q, k, v):
            x[:256] = torch.nan
            x[384:] = torch.nan
    out = attention(q, k, v, cu_seqlens, max_seqlen=256, deterministic=deterministic)
    middle = slice(256, 384)
    assert torch.isfinite(out[middle]).all()
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert torch.isfinite(gradient[middle]).all()


def test_keys_before_the_window_are_not_even_loaded(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([512], 2, 1, 64, torch.bfloat16, device)
    with torch.no_grad():
        for x in (q, k, v):
            x[:128] = torch.nan
    out = attention(q, k, v, cu_seqlens, max_seqlen=512, window=65)
    # Of the rows from 256 on, the first sees back to key 192, and blocks hold 64 keys.
    assert torch.isfinite(out[256:]).all()
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.isfinite(gradients[0][256:]).all()


@pytest.mark.parametrize("layout", ["heads first", "unaligned rows", "gaps between heads", "transposed"])
def test_any_strides(layout: str, device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([70, 60], 2, 2, 64, torch.bfloat16, device)
    q, k, v = (x.detach() for x in (q, k, v))

    def rearrange(x: Tensor) -> Tensor:
        if layout == "heads first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "transposed":
            return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        if layout == "unaligned rows":
            wide = x.new_zeros(x.shape[0], x.shape[1] * 64 + 1)
            return wide[:, 1:].view(x.shape).copy_(x)
        return x.new_zeros(x.shape[0], x.shape[1], 80)[..., :64].copy_(x)

    expected = attention(q, k, v, cu_seqlens, max_seqlen=70)
    odd = [rearrange(x).requires_grad_() for x in (q, k, v)]
    out = attention(*odd, cu_seqlens, max_seqlen=70, deterministic=True)
    assert torch.equal(out, expected)
    even = [x.contiguous().requires_grad_() for x in (q, k, v)]
    d_out = rearrange(torch.randn_like(expected))
    gradients = torch.autograd.grad(out, odd, d_out)
    even_out = attention(*even, cu_seqlens, max_seqlen=70, deterministic=True)
    for ours, expected in zip(
        gradients, torch.autograd.grad(even_out, even, d_out.contiguous()), strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_gradient_expanded_over_all_tokens(device: torch.device) -> None:
    """Its rows are one row, a stride that the copy engine does not know."""
    q, k, v, cu_seqlens = _inputs([70], 2, 2, 64, torch.bfloat16, device)
    row = torch.randn(1, 2, 64, device=device).bfloat16()
    out = attention(q, k, v, cu_seqlens, max_seqlen=70, deterministic=True)
    expanded = torch.autograd.grad(out, (q, k, v), row.expand(70, 2, 64), retain_graph=True)
    expected = torch.autograd.grad(out, (q, k, v), row.repeat(70, 1, 1))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(expanded, expected, strict=True))


def test_strided_bounds(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([70, 60], 2, 2, 64, torch.bfloat16, device)
    column = torch.stack([cu_seqlens, cu_seqlens + 1], 1)[:, 0]
    expected = attention(q, k, v, cu_seqlens, max_seqlen=70)
    assert torch.equal(attention(q, k, v, column, max_seqlen=70), expected)


def test_torch_can_ask_for_determinism(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from minicpm_kernels.attention import triton_bwd as attention_triton_bwd

    asked = []
    adds_dq = attention_triton_bwd.adds_dq
    monkeypatch.setattr(
        attention_triton_bwd, "adds_dq", lambda dim, wanted: asked.append(wanted) or adds_dq(dim, wanted)
    )
    q, k, v, cu_seqlens = _inputs([9], 1, 1, 16, torch.bfloat16, device)
    for warn_only in (True, False):
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        attention(q, k, v, cu_seqlens, max_seqlen=9).sum().backward()
    torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_more_than_two_to_the_31_elements_are_addressed(device: torch.device) -> None:
    """Rows 2^24 elements apart: the last of 160 lies 2.7e9 elements from the first. Few pages are touched."""
    torch.use_deterministic_algorithms(False)  # filling these 5 GiB would make them real
    torch.manual_seed(0)
    near = torch.randn(160, 3, 64, device=device).bfloat16()
    far = torch.empty(160 * 2**24, dtype=torch.bfloat16, device=device).as_strided(near.shape, (2**24, 64, 1))
    far.copy_(near)
    cu_seqlens = _cu_seqlens([100, 60], device)
    results = []
    for merged in (near, far):
        q, k, v = (x.detach().requires_grad_() for x in merged.split((1, 1, 1), 1))
        out = attention(q, k, v, cu_seqlens, max_seqlen=100, deterministic=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_token_bounds(device: torch.device) -> None:
    """The two integers of each token that say what a tile must read."""
    torch.manual_seed(2)
    lengths = torch.randint(0, 9, (300,)).tolist()
    cu_seqlens = _cu_seqlens(lengths, device)
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    ends = torch.repeat_interleave(cu_seqlens[1:], cu_seqlens.diff())
    tokens = torch.arange(sum(lengths), dtype=torch.int32, device=device)
    for window in (None, 3):
        first_key, end_query = attention_bounds(cu_seqlens, sum(lengths), window)
        reach = 3 if window else sum(lengths)
        assert torch.equal(first_key, torch.maximum(starts, tokens - reach + 1))
        assert torch.equal(end_query, torch.minimum(ends, tokens + reach))


@pytest.mark.parametrize("heads_per_section", [1, 2, 3, 8])
def test_every_head_and_tile_is_worked_on_once(heads_per_section: int, device: torch.device) -> None:
    seen = torch.zeros(5, 7, dtype=torch.int32, device=device)
    _visit_kernel[(35,)](seen, 5, 7, heads_per_section)
    assert (seen == 1).all()


def test_opcheck(device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares what an output's padding holds too
    q, k, v, cu_seqlens = _inputs([5, 0, 9], 2, 1, 64, torch.bfloat16, device)
    torch.library.opcheck(
        torch.ops.minicpm_kernels.attention.default, (q, k, v, cu_seqlens, 9, 0.25, None, True)
    )


def test_compiles_to_one_graph(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([20, 30], 2, 1, 64, torch.bfloat16, device)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (attention(2 * q, k, v, cu_seqlens, max_seqlen=30).float() ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected)


def test_what_the_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    q = torch.zeros(4, 2, 80, dtype=torch.bfloat16, device=device)
    with pytest.raises(RuntimeError, match="head dims 16, 32, 64 and 128, not 80"):
        attention(q, q, q, _cu_seqlens([4], device), max_seqlen=4)
    monkeypatch.delenv("MINICPM_KERNELS")
    assert attention_backend(q).name == "reference"
    assert torch.equal(attention(q, q, q, _cu_seqlens([4], device), max_seqlen=4), q)
