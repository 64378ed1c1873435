"""SwiGLU on both backends."""

import pytest
import torch
from minicpm_kernels import swiglu
from minicpm_kernels.swiglu import swiglu_reference
from torch.nn import functional as F


def swiglu_torch(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gate_up_of(shape, scale, device, dtype):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("shape", [(1, 2), (7, 126), (3, 2100), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients(
    shape, scale, dtype, device, backend, poisoned_memory, with_gradients, assert_as_accurate
):
    inputs = (gate_up_of(shape, scale, device, dtype),)
    ours, own = with_gradients(swiglu, inputs), with_gradients(swiglu_torch, inputs)
    exact = with_gradients(swiglu_torch, inputs, dtype=torch.float64)
    for what, *results in zip(("output", "d_gate_up"), ours, own, exact, strict=True):
        # float32 rounds at every step and addition; bf16 once, at the end
        assert_as_accurate(*results, what=what, roundings=8 if dtype == torch.float32 else 1)


def test_reference_is_the_definition(device, with_gradients):
    inputs = (gate_up_of((5, 32), 1.0, device, torch.float32),)
    torch.testing.assert_close(with_gradients(swiglu_reference, inputs), with_gradients(swiglu_torch, inputs))


def test_strided_input(device, backend, with_gradients):
    gate_up = gate_up_of((6, 48), 1.0, device, torch.float32)
    expected = with_gradients(swiglu, (gate_up,))
    wide = torch.cat([gate_up, gate_up], -1)
    for strided in (wide[:, :48], gate_up.t().contiguous().t()):
        torch.testing.assert_close(with_gradients(swiglu, (strided,)), expected)


def test_offsets_beyond_int32(device, triton_kernels, far_rows):
    gate_up = gate_up_of((3, 64), 1.0, device, torch.bfloat16)
    assert torch.equal(swiglu(far_rows(gate_up)), swiglu(gate_up))


def test_no_rows(device, backend, with_gradients):
    output, d_gate_up = with_gradients(swiglu, (torch.empty(0, 16, device=device),))
    assert output.shape == (0, 8)
    assert d_gate_up.shape == (0, 16)


def test_input_is_left_alone_and_bits_repeat(device, backend, with_gradients):
    gate_up = gate_up_of((9, 64), 1.0, device, torch.bfloat16)
    before = gate_up.clone()
    first, second = with_gradients(swiglu, (gate_up,)), with_gradients(swiglu, (gate_up,))
    assert torch.equal(gate_up, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_whole_graph_compiles(device, backend, with_gradients):
    inputs = (gate_up_of((6, 32), 1.0, device, torch.float32),)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, inputs), with_gradients(swiglu, inputs))


def test_opcheck(device, triton_kernels):
    from minicpm_kernels import swiglu_triton as ops

    gate_up = gate_up_of((5, 32), 1.0, device, torch.float32)
    torch.library.opcheck(ops.swiglu_fwd, (gate_up,))
    torch.library.opcheck(ops.swiglu_bwd, (gate_up, gate_up[:, :16]))


def test_refuses_an_odd_width(device):
    with pytest.raises(ValueError, match="must be even, not 7"):
        swiglu(torch.zeros(2, 7, device=device))
