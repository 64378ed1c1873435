"""The Gluon backward: compiled for sm_90 anywhere; run on a Hopper card or in the emulator."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
from minicpm_kernels.attention.reference import attention_reference, attention_reference_backward
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from minicpm_kernels import attention
from minicpm_kernels.attention import gluon_bwd as attention_gluon_bwd
from minicpm_kernels.attention import gluon_fwd as attention_gluon_fwd
from minicpm_kernels.attention import triton_bwd as attention_triton_bwd
from minicpm_kernels.attention.gluon_bwd import attention_gluon_backward, gluon_backward_unsupported_reason

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")

IN_EMULATOR = os.environ.get("MINICPM_TEST_DEVICE") == "sm90"
MANY_DOCUMENTS = [1, 1, 3, 50, 2, 0, 77, 30, 5, 129, 64, 100, 0]
# Of 300 tokens: the first starts late, falls, ends beyond the tokens, is negative.
UNUSABLE_CU_SEQLENS = [[150, 300], [0, 192, 250, 10, 300], [0, 2**31 - 1], [-(2**31), 100, 300]]


@pytest.fixture
def runnable(device: torch.device) -> None:
    """Skip where no Hopper card runs the kernel, nor the emulator."""
    if unsupported_reason := gluon_backward_unsupported_reason(64, torch.bfloat16, device):
        pytest.skip(unsupported_reason)


class Problem:
    """Inputs of a backward, its exact gradients and those of torch in the inputs' precision."""

    def __init__(
        self,
        device: torch.device,
        lengths: list[int],
        *,
        heads: int = 1,
        kv_heads: int = 1,
        head_dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        window: int | None = None,
        size: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        # Slices of one merged projection, as the model has them: rows are not contiguous.
        merged = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, generator=generator) * size
        self.inputs = merged.to(device, dtype).split((heads, kv_heads, kv_heads), 1)
        self.d_out = torch.randn(sum(lengths), heads, head_dim, generator=generator).to(device, dtype)
        self.cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        self.max_seqlen, self.scale, self.window = max(lengths), head_dim**-0.5, window
        self.options = {"scale": self.scale, "window": window}
        wide = [x.float() for x in self.inputs]
        out, self.lse = attention_reference(*wide, self.cu_seqlens, **self.options)
        self.out = out.to(dtype)
        self.exact = attention_reference_backward(self.d_out.float(), *wide, self.cu_seqlens, **self.options)

    def gradients(self, *, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        return attention_gluon_backward(
            self.d_out, *self.inputs, self.out, self.lse, self.cu_seqlens,
            max_seqlen=self.max_seqlen, deterministic=deterministic, **self.options,
        )  # fmt: skip

    def torch_own(self) -> tuple[Tensor, ...]:
        """Of torch's scaled_dot_product_attention, masked, all documents at once."""
        tokens = torch.arange(self.d_out.shape[0], device=self.d_out.device)
        document = torch.bucketize(tokens, self.cu_seqlens[1:], right=True)
        visible = (document[:, None] == document[None, :]) & (tokens[:, None] >= tokens[None, :])
        if self.window is not None:
            visible &= tokens[:, None] - tokens[None, :] < self.window
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        batch = [x.transpose(0, 1)[None] for x in leaves]
        out = F.scaled_dot_product_attention(*batch, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)
        return torch.autograd.grad(out, leaves, self.d_out)


def _check(
    problem: Problem,
    assert_as_accurate: Callable[..., None],
    *,
    deterministic: bool = False,
    floor: float = 1e-6,
) -> None:
    """Every gradient against the exact one and torch's own error."""
    gradients = problem.gradients(deterministic=deterministic)
    for name, ours, own, exact in zip("qkv", gradients, problem.torch_own(), problem.exact, strict=True):
        assert_as_accurate(ours, own, exact, floor=floor, what=f"d{name}")


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [[1], [63], [130], [450], MANY_DOCUMENTS], ids=str)
def test_as_accurate_as_torch(
    lengths: list[int], head_dim: int, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    _check(Problem(device, lengths, head_dim=head_dim), assert_as_accurate)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [1, 70])
def test_windows_and_grouped_heads(
    window: int, deterministic: bool, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    problem = Problem(device, [30, 210], heads=3, window=window)
    _check(problem, assert_as_accurate, deterministic=deterministic)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_float16(head_dim: int, device: torch.device, assert_as_accurate: Callable[..., None]) -> None:
    problem = Problem(device, [20, 150], heads=2, kv_heads=2, head_dim=head_dim, dtype=torch.float16)
    _check(problem, assert_as_accurate)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("size", [1e-3, 1e2])
def test_sizes(size: float, device: torch.device, assert_as_accurate: Callable[..., None]) -> None:
    _check(Problem(device, [140], size=size), assert_as_accurate, floor=1e-6 * size)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3.0), (torch.bfloat16, 1e2)], ids=str)
def test_rows_of_one_key_in_a_last_tile_that_is_not_full(
    dtype: torch.dtype, size: float, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    """A single score may be far below zero, and so the log-sum-exp of what would see keys beyond the last token."""
    _check(Problem(device, [1] * 70, dtype=dtype, size=size), assert_as_accurate, floor=1e-6 * size**2)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("end", "num_tokens"), [(60, 90), (100, 300)])
def test_tokens_of_no_document(end: int, num_tokens: int, deterministic: bool, device: torch.device) -> None:
    """cu_seqlens must not end before the tokens do, and a card does not check that: no hang, no other gradients."""
    problem = Problem(device, [end, num_tokens - end])
    expected = problem.gradients(deterministic=deterministic)
    problem.cu_seqlens = problem.cu_seqlens[:2]
    for ours, theirs in zip(problem.gradients(deterministic=deterministic), expected, strict=True):
        torch.testing.assert_close(ours[:end], theirs[:end])


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("cu_seqlens", UNUSABLE_CU_SEQLENS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_unusable_cu_seqlens_do_not_hang(head_dim: int, cu_seqlens: list[int], device: torch.device) -> None:
    problem = Problem(device, [300], head_dim=head_dim)
    problem.cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    for deterministic in (False, True):
        assert problem.gradients(deterministic=deterministic)[0].shape == (300, 1, head_dim)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_stages_are_fenced_before_tma_writes_them_again(
    head_dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-sum-exp and delta are read by ordinary loads and overwritten by TMA: two proxies."""
    if not IN_EMULATOR:
        pytest.skip("only the emulator sees fences")
    from ptx_emulator.driver import mode_from_environment, use

    # Triton's own kernels leave this fence out.
    monkeypatch.setattr(attention_gluon_bwd, "separate_dq", lambda *arguments, **options: None)
    problem = Problem(device, [450], head_dim=head_dim)
    with use(dataclasses.replace(mode_from_environment(), read_fences=True)):
        for deterministic in (False, True):
            problem.gradients(deterministic=deterministic)


@pytest.mark.usefixtures("runnable")
def test_heads_in_sections(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    """The last section has fewer heads than the others."""
    monkeypatch.setattr(attention_triton_bwd, "heads_per_section", lambda *arguments: 2)
    _check(Problem(device, [90, 130], heads=5, kv_heads=5), assert_as_accurate)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic_is_bit_equal(head_dim: int, device: torch.device) -> None:
    problem = Problem(device, [300], heads=2, head_dim=head_dim)
    first, second = (problem.gradients(deterministic=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_no_tokens(device: torch.device) -> None:
    empty = torch.empty(0, 2, 64, dtype=torch.bfloat16, device=device)
    gradients = attention_gluon_backward(
        empty, empty, empty, empty, empty, torch.empty(2, 0, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        max_seqlen=0, scale=0.125, window=None, deterministic=False,
    )  # fmt: skip
    assert [x.shape for x in gradients] == [(0, 2, 64)] * 3


def test_missing_part_of_gluon_is_named(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton._C.libtriton import gluon_ir

    monkeypatch.setattr(attention_gluon_bwd, "gluon_unsupported_reason", lambda *arguments: "")
    assert gluon_backward_unsupported_reason(64, torch.bfloat16, device) == ""
    monkeypatch.setattr(gluon_ir, "GluonOpBuilder", object)
    assert gluon_backward_unsupported_reason(64, torch.bfloat16, device).endswith(
        "has no create_async_tma_reduce"
    )


@pytest.mark.slow
def test_compiles_within_limits(run_where_triton_compiles: Callable[[str], str]) -> None:
    """In a process without the interpreter, both types. MMAs stay in flight: where ptxas cannot keep them so, it
    waits after each instruction (gsb0), not after each MMA, and says it only in its log."""
    program = """
import dataclasses, re, tempfile
from pathlib import Path
from minicpm_kernels_testing.sm90_compile import compile_sm90, cuobjdump, resources
from minicpm_kernels_testing.cases.attention import gluon_backward_cases
for case in gluon_backward_cases():
    half = {name: type_.replace("bf16[", "fp16[") for name, type_ in case.types.items()}
    for variant in (case, dataclasses.replace(case, types=half)):
        compiled = compile_sm90(variant)
        for problem in resources(compiled).broken_limits(needs_tensor_cores=case.needs_tensor_cores):
            print(case.name, problem)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            waits = len(re.findall("HGMMA[^;]*gsb0", cuobjdump("--dump-sass", cubin)))
        if waits != compiled.asm["ptx"].count("wgmma.commit_group"):
            print(case.name, "waits for its MMAs one by one")
"""
    assert run_where_triton_compiles(program) == ""


@pytest.mark.slow
def test_all_warps_of_a_partition_are_done_when_one_arrives(
    run_where_triton_compiles: Callable[[str], str],
) -> None:
    """One thread arrives at an mbarrier for its partition; the compiler puts the bar.sync before it."""
    program = """
import re
from minicpm_kernels_testing.sm90_compile import compile_sm90
from minicpm_kernels_testing.cases.attention import gluon_backward_cases, gluon_forward_cases
for case in gluon_backward_cases() + gluon_forward_cases():
    if case.needs_tensor_cores:
        ptx = re.sub(r"//.*|\\.loc .*|\\s*\\n", "\\n", compile_sm90(case).asm["ptx"])
        ptx = [line.strip() for line in ptx.splitlines() if line.strip()]
        arrivals = [i for i, line in enumerate(ptx) if "mbarrier.arrive.shared" in line]
        alone = [i for i in arrivals if not any("bar.sync" in line for line in ptx[i - 4 : i])]
        print(case.name, len(arrivals) > 3, len(alone))
"""
    lines = run_where_triton_compiles(program).splitlines()
    assert len(lines) == 5
    assert all(line.endswith(" True 0") for line in lines), lines


@pytest.mark.usefixtures("runnable")
def test_attention_runs_it_unless_ruled_out(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (
        x.detach().requires_grad_() for x in torch.randn(3, 70, 2, 64, device=device).bfloat16().unbind()
    )
    cu_seqlens = torch.tensor([0, 30, 70], dtype=torch.int32, device=device)
    ran = []
    for module, name in (
        (attention_gluon_fwd, "attention_gluon_forward"),
        (attention_gluon_bwd, "attention_gluon_backward"),
    ):
        launch = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, launch=launch, name=name, **kw: ran.append(name) or launch(*args, **kw),
        )
    for setting, expected in (("0", []), ("1", ["attention_gluon_forward", "attention_gluon_backward"])):
        monkeypatch.setenv("MINICPM_GLUON", setting)
        out = attention(q, k, v, cu_seqlens, max_seqlen=40)
        gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert all(torch.isfinite(x).all() for x in (out, *gradients))
        assert ran == expected
