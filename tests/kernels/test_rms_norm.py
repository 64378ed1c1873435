"""RMSNorm, alone and with the residual add, on both backends."""

import pytest
import torch
from minicpm_kernels import rms_norm, rms_norm_residual
from minicpm_kernels.rms_norm import rms_norm_reference, rms_norm_residual_reference
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

EPS, BRANCH_SCALE = 1e-5, 0.221
SHAPES = [(1, 8), (63, 100), (3, 2304), (2, 5, 64)]


def fused(residual, branch, weight):
    return rms_norm_residual(residual, branch, weight, eps=EPS, branch_scale=BRANCH_SCALE)


def fused_torch(residual, branch, weight):
    new_residual = residual + (BRANCH_SCALE * branch).to(residual.dtype)
    return F.rms_norm(new_residual, weight.shape, weight.to(residual.dtype), EPS).to(
        branch.dtype
    ), new_residual


def tensors(shape, scale, device, dtype, count):
    generator = torch.Generator().manual_seed(0)
    rows = [(scale * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(count)]
    return *rows, torch.randn(shape[-1], generator=generator).to(device, dtype)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain(shape, scale, dtype, device, backend, poisoned_memory, with_gradients, assert_as_accurate):
    inputs = tensors(shape, scale, device, dtype, 1)
    ours = with_gradients(lambda x, weight: rms_norm(x, weight, eps=EPS), inputs)
    own = with_gradients(lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS), inputs)
    exact = with_gradients(
        lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS), inputs, dtype=torch.float64
    )
    for what, *results in zip(("output", "d_x", "d_weight"), ours, own, exact, strict=True):
        # float32 rounds at every step and addition; bf16 once, at the end
        assert_as_accurate(*results, what=what, roundings=8 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("residual_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_with_residual(
    shape, scale, residual_dtype, dtype, device, backend, poisoned_memory, with_gradients, assert_as_accurate
):
    residual, branch, weight = tensors(shape, scale, device, dtype, 2)
    inputs = (residual.to(residual_dtype), branch, weight)
    ours, own = with_gradients(fused, inputs), with_gradients(fused_torch, inputs)
    exact = with_gradients(fused_torch, inputs, dtype=torch.float64)
    names = ("output", "new residual", "d_residual", "d_branch", "d_weight")
    for what, *results in zip(names, ours, own, exact, strict=True):
        # float32 rounds at every step and addition; bf16 once, at the end
        assert_as_accurate(*results, what=what, roundings=8 if dtype == torch.float32 else 1)


def test_reference_is_the_definition(device, with_gradients):
    inputs = tensors((5, 32), 1.0, device, torch.float32, 2)
    result = with_gradients(
        lambda x, y, w: rms_norm_residual_reference(x, y, w, eps=EPS, branch_scale=BRANCH_SCALE), inputs
    )
    torch.testing.assert_close(result, with_gradients(fused_torch, inputs))
    x, _, weight = inputs
    exact = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    torch.testing.assert_close(rms_norm_reference(x, weight, eps=EPS), exact)


def test_strided_inputs(device, backend, with_gradients):
    residual, branch, weight = tensors((6, 48), 1.0, device, torch.float32, 2)
    strided = (
        residual.t().contiguous().t(),
        torch.cat([branch, branch], -1)[:, :48],
        torch.stack([weight] * 2, 1)[:, 0],
    )
    expected = with_gradients(fused, (residual, branch, weight))
    torch.testing.assert_close(with_gradients(fused, strided), expected)


def test_zero_rows_and_a_row_of_zeros(device, backend, with_gradients):
    weight = torch.ones(16, device=device)
    output, d_x, d_weight = with_gradients(
        lambda x, w: rms_norm(x, w, eps=EPS), (torch.empty(0, 16, device=device), weight)
    )
    assert output.shape == d_x.shape == (0, 16)
    assert not d_weight.any()
    output, d_x, _ = with_gradients(
        lambda x, w: rms_norm(x, w, eps=EPS), (torch.zeros(2, 16, device=device), weight)
    )
    assert not output.any()
    assert torch.isfinite(d_x).all()


def test_twice_the_same_bits(device, backend, with_gradients):
    inputs = tensors((130, 64), 1.0, device, torch.bfloat16, 2)
    first, second = with_gradients(fused, inputs), with_gradients(fused, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_whole_graph_compiles(device, backend, with_gradients):
    inputs = tensors((6, 32), 1.0, device, torch.float32, 2)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, inputs), with_gradients(fused, inputs))


def test_activation_checkpointing(device, backend, with_gradients):
    inputs = tensors((6, 32), 1.0, device, torch.float32, 2)
    recomputed = with_gradients(lambda *x: checkpoint(fused, *x, use_reentrant=False), inputs)
    torch.testing.assert_close(recomputed, with_gradients(fused, inputs))


def test_opcheck(device, triton_kernels):
    from minicpm_kernels import rms_norm_triton as ops

    x, branch, weight = tensors((5, 32), 1.0, device, torch.float32, 2)
    rstd = torch.rand(5, device=device)
    torch.library.opcheck(ops.rms_norm_fwd, (x, weight, EPS))
    torch.library.opcheck(ops.rms_norm_bwd, (x, weight, rstd, branch))
    torch.library.opcheck(ops.rms_norm_residual_fwd, (x, branch, weight, EPS, BRANCH_SCALE))
    torch.library.opcheck(ops.rms_norm_residual_bwd, (x, weight, rstd, branch, branch, BRANCH_SCALE))


def test_refuses_what_does_not_fit(device):
    x, branch, weight = tensors((5, 32), 1.0, device, torch.float32, 2)
    with pytest.raises(ValueError, match=r"weight \(16,\) does not fit rows of 32"):
        rms_norm(x, weight[:16], eps=EPS)
    with pytest.raises(ValueError, match=r"residual \(5, 32\) and branch \(4, 32\) differ"):
        fused(x, branch[:4], weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler modules
def test_inductor_keeps_the_scale_after_a_matrix_product():
    """Inductor (torch 2.13) makes an addmm of ``torch.add(x, a @ b, alpha=…)`` that forgets alpha."""

    def block(x_ND, weight_DD):
        return rms_norm_residual(x_ND, x_ND @ weight_DD, torch.ones(16), eps=1e-5, branch_scale=0.4)

    x_ND, weight_DD = torch.randn(8, 16), torch.randn(16, 16)
    torch.testing.assert_close(torch.compile(block)(x_ND, weight_DD), block(x_ND, weight_DD))
