"""The patched interpreter must round bf16 as hardware does, or every bf16 kernel test would be worthless."""

import os

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = [
    pytest.mark.usefixtures("triton_kernels"),
    pytest.mark.skipif(
        os.environ.get("MINICPM_TEST_DEVICE", "cpu") != "cpu", reason="the interpreter is not in use"
    ),
]


@triton.jit
def _arithmetic_kernel(p_x, p_y, p_sum, p_product, p_less, p_exp, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(p_x + offsets), tl.load(p_y + offsets)
    tl.store(p_sum + offsets, x + y)
    tl.store(p_product + offsets, x * y * tl.full((SIZE,), 3.0, tl.bfloat16))
    tl.store(p_less + offsets, (x < y).to(tl.int32))
    tl.store(p_exp + offsets, tl.exp2(x.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _dot_kernel(p_a, p_b, p_c, p_row, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(p_a + rows * SIZE + columns), tl.load(p_b + rows * SIZE + columns)
    tl.store(p_c + rows * SIZE + columns, tl.dot(a, b.T))
    tl.store(p_row + tl.arange(0, SIZE), tl.max(a, 1))


def test_bf16_arithmetic_matches_torch() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(256).mul(3).bfloat16() for _ in range(2))
    outputs = [
        torch.empty_like(x),
        torch.empty_like(x),
        torch.empty(256, dtype=torch.int32),
        torch.empty_like(x),
    ]
    _arithmetic_kernel[(1,)](x, y, *outputs, SIZE=256)
    total, product, less, exponential = outputs
    assert torch.equal(total, x + y)
    assert torch.equal(product, x * y * torch.tensor(3.0, dtype=torch.bfloat16))
    assert torch.equal(less, (x < y).int())
    assert torch.equal(exponential, torch.exp2(x.float()).bfloat16())


def test_bf16_dot_and_reduction_match_torch() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    product, row_maximum = torch.empty(32, 32), torch.empty(32, dtype=torch.bfloat16)
    _dot_kernel[(1,)](a, b, product, row_maximum, SIZE=32)
    torch.testing.assert_close(product, a.float() @ b.float().T)
    assert torch.equal(row_maximum, a.amax(1))


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    from minicpm_kernels_testing.interpreter import bf16_bits_to_float32, float32_to_bf16_bits

    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,)).int()
    ties = (torch.arange(0, 65536).int() << 16) | 0x8000  # exactly between two bf16 numbers
    values = torch.cat([bits, ties]).view(torch.float32)
    ours = torch.from_numpy(bf16_bits_to_float32(float32_to_bf16_bits(values.numpy())))
    torch.testing.assert_close(ours, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
