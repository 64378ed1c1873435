"""Rotary embedding on both backends."""

import math

import pytest
import torch
from minicpm_kernels import rope, rope_tables
from minicpm_kernels.rope import rope_reference


def rope_torch(x, cos, sin):
    """As a model in this precision writes it: tables rounded to the type of x, half-rotation by concatenation."""
    cos, sin = (torch.cat([table, table], -1)[:, None].to(x.dtype) for table in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def case(shape, scale, device, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(shape, generator=generator)).to(device, dtype)
    positions = torch.randint(0, 4096, shape[:1], generator=generator).to(device)
    half = shape[-1] // 2
    inv_freq = 10_000.0 ** (-torch.arange(half, device=device) / half)
    return x, *rope_tables(positions, inv_freq)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 36, 64), (3, 3, 128), (4, 33, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients(
    shape, scale, dtype, device, backend, poisoned_memory, with_gradients, assert_as_accurate
):
    x, cos, sin = case(shape, scale, device, dtype)
    ours = with_gradients(lambda x: rope(x, cos, sin), (x,))
    own = with_gradients(lambda x: rope_torch(x, cos, sin), (x,))
    exact = with_gradients(lambda x: rope_torch(x, cos.double(), sin.double()), (x,), dtype=torch.float64)
    for what, *results in zip(("output", "d_x"), ours, own, exact, strict=True):
        # float32 rounds at every step and addition; bf16 once, at the end
        assert_as_accurate(*results, what=what, roundings=8 if dtype == torch.float32 else 1)


def test_tables_are_angles_times_the_factor(device):
    inv_freq = torch.tensor([1.0, 0.25], device=device)
    cos, sin = rope_tables(torch.tensor([0, 3], device=device), inv_freq, 1.5)
    expected = [[1.5, 1.5], [1.5 * math.cos(3.0), 1.5 * math.cos(0.75)]]
    torch.testing.assert_close(cos.cpu(), torch.tensor(expected))
    expected = [[0.0, 0.0], [1.5 * math.sin(3.0), 1.5 * math.sin(0.75)]]
    torch.testing.assert_close(sin.cpu(), torch.tensor(expected))


def test_scores_depend_on_distance_alone(device, backend):
    inv_freq = 100.0 ** (-torch.arange(8, device=device) / 8)
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).to(device)

    def score(q_position, k_position):
        positions = torch.tensor([q_position, k_position], device=device)
        q_turned, k_turned = rope(torch.cat([q, k]), *rope_tables(positions, inv_freq))
        return (q_turned * k_turned).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)


def test_slice_of_a_merged_projection(device, backend, with_gradients):
    x, cos, sin = case((5, 6, 16), 1.0, device, torch.float32)
    expected = with_gradients(lambda x: rope(x, cos, sin), (x[:, :4].contiguous(),))
    for strided in (x[:, :4], x[:, :4].transpose(0, 2).contiguous().transpose(0, 2)):
        result = with_gradients(lambda x: rope(x, cos, sin), (strided,))
        torch.testing.assert_close(result, expected)
        assert result[0].is_contiguous()


def test_offsets_beyond_int32(device, triton_kernels, far_rows):
    x, cos, sin = case((3, 2, 16), 1.0, device, torch.bfloat16)
    assert torch.equal(rope(far_rows(x), cos, sin), rope(x, cos, sin))


def test_reference_is_the_definition(device):
    x, cos, sin = case((5, 3, 16), 1.0, device, torch.float32)
    torch.testing.assert_close(rope_reference(x, cos, sin), rope_torch(x, cos, sin))


def test_input_is_left_alone_and_bits_repeat(device, backend, with_gradients):
    x, cos, sin = case((5, 3, 16), 1.0, device, torch.bfloat16)
    before = x.clone()
    first, second = (with_gradients(lambda x: rope(x, cos, sin), (x,)) for _ in range(2))
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens(device, backend):
    empty = torch.empty(0, 4, device=device)
    assert rope(torch.empty(0, 3, 8, device=device), empty, empty).shape == (0, 3, 8)


def test_whole_graph_compiles(device, backend, with_gradients):
    x, cos, sin = case((5, 3, 16), 1.0, device, torch.float32)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    result = with_gradients(lambda x: compiled(x, cos, sin), (x,))
    torch.testing.assert_close(result, with_gradients(lambda x: rope(x, cos, sin), (x,)))


def test_opcheck(device, triton_kernels):
    from minicpm_kernels.rope_triton import rope_turn

    x, cos, sin = case((5, 3, 16), 1.0, device, torch.float32)
    torch.library.opcheck(rope_turn, (x, cos, sin, False))
    torch.library.opcheck(rope_turn, (x[:, :2], cos, sin, True))


def test_refuses_tables_that_do_not_fit(device):
    x, cos, sin = case((5, 3, 16), 1.0, device, torch.float32)
    with pytest.raises(ValueError, match=r"needs cos and sin of shape \(5, 8\)"):
        rope(x, cos[:4], sin)
    with pytest.raises(ValueError, match="needs cos and sin"):
        rope(x[..., :15], cos, sin)
