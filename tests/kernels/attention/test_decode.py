"""Attention of one new token to its cache: plain torch, and the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from minicpm_kernels import attention, attention_decode
from torch import Tensor


def _exact(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None) -> Tensor:
    """Float32, one sequence after another, reading only what each cache holds."""
    out = torch.zeros(q.shape, device=q.device)
    group = q.shape[1] // k.shape[2]
    for row, length in enumerate(lengths.tolist()):
        start = 0 if window is None else max(0, length - window)
        if length == 0:
            continue
        keys, values = (x[row, start:length].float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("hd,thd->ht", q[row].float(), keys) * q.shape[2] ** -0.5
        out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), values)
    return out


def _inputs(
    heads: int, kv_heads: int, head_dim: int, capacity: int, lengths: list[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cache whose unused part is NaN, as memory that was never written may be."""
    torch.manual_seed(0)
    shape = (len(lengths), capacity, kv_heads, head_dim)
    q = torch.randn(len(lengths), heads, head_dim, device=device).bfloat16()
    k, v = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, length:] = torch.nan
        v[row, length:] = torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device)


@pytest.mark.parametrize("window", [None, 1, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 128), (36, 1, 64), (4, 2, 16)]
)
def test_matches_the_reference(
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    backend: str,
    poisoned_memory: None,
    device: torch.device,
) -> None:
    inputs = _inputs(heads, kv_heads, head_dim, 700, [1, 700, 0, 63, 500], device)
    out = attention_decode(*inputs, window=window)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), _exact(*inputs, window), rtol=2e-2, atol=4e-3)


def test_the_kernel_is_as_accurate_as_torch(
    triton_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    assert_as_accurate: Callable[..., None],
) -> None:
    q, k, v, lengths = _inputs(6, 2, 64, 1000, [1000], device)
    ours = attention_decode(q, k, v, lengths)
    own = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
    )[:, :, 0]
    assert_as_accurate(ours, own, _exact(q, k, v, lengths, None))


def test_continues_the_prompt(device: torch.device) -> None:
    """Decoding a document's last token gives what attention over the whole document gives it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(50, 8, 64, device=device).split((4, 2, 2), 1)
    whole = attention(q, k, v, torch.tensor([0, 50], dtype=torch.int32, device=device), max_seqlen=50)
    length = torch.tensor([50], dtype=torch.int32, device=device)
    last = attention_decode(q[-1:], k[None], v[None], length)
    torch.testing.assert_close(last[0], whole[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("triton_kernels")
def test_a_slice_of_a_larger_cache(device: torch.device) -> None:
    q, k, v, lengths = _inputs(4, 2, 64, 600, [600, 20], device)
    larger = torch.stack((k, v), 2)
    assert torch.equal(
        attention_decode(q, larger[:, :, 0], larger[:, :, 1], lengths), attention_decode(q, k, v, lengths)
    )


@pytest.mark.usefixtures("triton_kernels")
def test_more_than_two_to_the_31_elements_are_addressed(device: torch.device) -> None:
    q, k, v, lengths = _inputs(1, 1, 64, 160, [160], device)
    far = torch.empty(160 * 2**24, dtype=torch.bfloat16, device=device).as_strided(
        (1, 160, 1, 64), (1, 2**24, 1, 1)
    )
    assert torch.equal(attention_decode(q, far.copy_(k), v, lengths), attention_decode(q, k, v, lengths))


def test_opcheck(backend: str, device: torch.device) -> None:
    q, k, v, lengths = _inputs(2, 1, 64, 10, [10, 3], device)
    torch.library.opcheck(torch.ops.minicpm_kernels.attention_decode.default, (q, k, v, lengths, 0.125, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 1, 4, 16)}, "q has 4 dimensions"),
        ({"k": torch.zeros(3, 9, 2, 16)}, r"k \(3, 9, 2, 16\)"),
        ({"q": torch.zeros(2, 3, 16)}, "3 query heads"),
        ({"q": torch.zeros(2, 4, 16, dtype=torch.float16)}, "must be one type"),
        ({"lengths": torch.zeros(2)}, r"lengths is torch.float32 \(2,\)"),
        ({"window": 0}, "window=0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(2, 4, 16),
        "k": torch.zeros(2, 9, 2, 16),
        "v": torch.zeros(2, 9, 2, 16),
        "lengths": torch.zeros(2, dtype=torch.int32),
    } | change
    q, k, v, lengths = (arguments.pop(name) for name in ("q", "k", "v", "lengths"))
    with pytest.raises(ValueError, match=message):
        attention_decode(q, k, v, lengths, **arguments)


@pytest.mark.usefixtures("triton_kernels")
def test_a_scattered_cache_is_refused_not_copied(device: torch.device) -> None:
    q, k, v, lengths = _inputs(2, 1, 64, 10, [10, 3], device)
    with pytest.raises(ValueError, match="k must be contiguous in its last dimension"):
        attention_decode(q, k.transpose(1, 3).contiguous().transpose(1, 3), v, lengths)
