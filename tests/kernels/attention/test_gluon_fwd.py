"""The Gluon forward: compiled for sm_90 anywhere; run on a Hopper card or in the emulator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from minicpm_kernels.attention.reference import attention_reference
from minicpm_kernels.backend import interpreter_enabled
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from minicpm_kernels.attention import gluon as attention_gluon
from minicpm_kernels.attention import gluon_fwd as attention_gluon_fwd
from minicpm_kernels.attention.gluon import gluon_unsupported_reason
from minicpm_kernels.attention.gluon_fwd import attention_gluon_forward

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")

MANY_DOCUMENTS = [1, 1, 3, 50, 2, 0, 77, 30, 5, 129, 64, 100, 0]
# Of 300 tokens: the first starts late, falls, ends beyond the tokens, is negative.
UNUSABLE_CU_SEQLENS = [[150, 300], [0, 192, 250, 10, 300], [0, 2**31 - 1], [-(2**31), 100, 300]]


@pytest.fixture
def runnable(device: torch.device) -> None:
    """Skip where no Hopper card runs the kernel, nor the emulator."""
    if unsupported_reason := gluon_unsupported_reason(64, torch.bfloat16, device):
        pytest.skip(unsupported_reason)


@pytest.fixture(params=[2, 200], ids=lambda programs: f"{programs} programs")
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs take many tiles each, many take one at most."""
    monkeypatch.setattr(attention_gluon_fwd, "_num_sms", lambda device: request.param)


def _inputs(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slices of one merged projection, as the model has them: rows are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    merged = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, generator=generator)
    q, k, v = merged.to(device, dtype).split((heads, kv_heads, kv_heads), 1)
    return q, k, v, torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def _torch_own(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """torch's scaled_dot_product_attention in the same precision, masked, all documents at once."""
    tokens = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(tokens, cu_seqlens[1:], right=True)
    visible = (document[:, None] == document[None, :]) & (tokens[:, None] >= tokens[None, :])
    if window is not None:
        visible &= tokens[:, None] - tokens[None, :] < window
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return F.scaled_dot_product_attention(*batch, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)


def _run(inputs: tuple[Tensor, Tensor, Tensor, Tensor], window: int | None) -> tuple[Tensor, Tensor]:
    q, _, _, cu_seqlens = inputs
    max_seqlen = int(cu_seqlens.diff().max())
    return attention_gluon_forward(*inputs, max_seqlen=max_seqlen, scale=q.shape[2] ** -0.5, window=window)


def _check(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    assert_as_accurate: Callable[..., None],
    *,
    window: int | None = None,
) -> None:
    """Output and log-sum-exp against the float32 reference and torch's own error; two runs, the same bits."""
    q, k, v, cu_seqlens = inputs
    out, lse = _run(inputs, window)
    exact, exact_lse = attention_reference(
        q.float(), k.float(), v.float(), cu_seqlens, scale=q.shape[2] ** -0.5, window=window
    )
    assert_as_accurate(out, _torch_own(q, k, v, cu_seqlens, window), exact)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
    again = _run(inputs, window)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "lengths", [[1], [63], [200], [450], MANY_DOCUMENTS], ids=lambda lengths: f"{lengths}"
)
def test_as_accurate_as_torch(
    lengths: list[int], head_dim: int, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    _check(_inputs(lengths, 1, 1, head_dim, torch.bfloat16, device), assert_as_accurate)


@pytest.mark.usefixtures("runnable", "programs")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [1, 70])
def test_windows_and_grouped_heads(
    window: int, head_dim: int, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    _check(_inputs([30, 210], 3, 1, head_dim, torch.bfloat16, device), assert_as_accurate, window=window)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_float16(head_dim: int, device: torch.device, assert_as_accurate: Callable[..., None]) -> None:
    _check(_inputs([20, 150], 2, 2, head_dim, torch.float16, device), assert_as_accurate)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("size", [1e-3, 1e2])
def test_sizes(size: float, device: torch.device, assert_as_accurate: Callable[..., None]) -> None:
    q, k, v, cu_seqlens = _inputs([140], 1, 1, 64, torch.bfloat16, device)
    _check((q * size, k * size, v * size, cu_seqlens), assert_as_accurate)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("cu_seqlens", UNUSABLE_CU_SEQLENS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_unusable_cu_seqlens_do_not_hang(head_dim: int, cu_seqlens: list[int], device: torch.device) -> None:
    """The host does not look at their values. The emulator ends a deadlock, a card would not."""
    q, k, v, _ = _inputs([300], 1, 1, head_dim, torch.bfloat16, device)
    out, _ = _run((q, k, v, torch.tensor(cu_seqlens, dtype=torch.int32, device=device)), None)
    assert out.shape == q.shape


@pytest.mark.usefixtures("runnable")
def test_tokens_before_the_first_document_leave_it_alone(device: torch.device) -> None:
    q, k, v, cu_seqlens = _inputs([150, 150], 1, 1, 64, torch.bfloat16, device)
    expected, _ = _run((q, k, v, cu_seqlens), None)
    out, _ = _run((q, k, v, cu_seqlens[1:]), None)
    assert torch.equal(out[150:], expected[150:])
    assert torch.equal(out[:150], v[:150])


@pytest.mark.usefixtures("runnable")
def test_heads_in_sections(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_as_accurate: Callable[..., None]
) -> None:
    """The last section has fewer heads than the others."""
    monkeypatch.setattr(attention_gluon_fwd, "heads_per_section", lambda *arguments: 2)
    _check(_inputs([90, 130], 5, 5, 64, torch.bfloat16, device), assert_as_accurate)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "clause"),
    [(32, torch.bfloat16, "head dims 64 and 128, not 32"), (64, torch.float32, "float16, not torch.float32")],
)
def test_unsupported_reasons(
    head_dim: int, dtype: torch.dtype, clause: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("every unsupported_reason is the card's here")
    monkeypatch.setattr(attention_gluon, "interpreter_enabled", lambda: False)
    assert gluon_unsupported_reason(64, torch.bfloat16, device) == ""
    assert clause in gluon_unsupported_reason(head_dim, dtype, device)


def test_missing_parts_of_gluon_are_named(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gluon, "interpreter_enabled", lambda: False)
    monkeypatch.delattr(attention_gluon.tma, "store_wait")
    assert gluon_unsupported_reason(64, torch.bfloat16, device).endswith(
        "has no triton.experimental.gluon.language.nvidia.hopper.tma.store_wait"
    )


def test_interpreter_is_an_unsupported_reason(device: torch.device) -> None:
    assert ("interpreter" in gluon_unsupported_reason(64, torch.bfloat16, device)) == interpreter_enabled()


@pytest.mark.slow
def test_compiles_within_limits(run_where_triton_compiles: Callable[[str], str]) -> None:
    """Both head dims, both types."""
    problems = run_where_triton_compiles("""
import dataclasses
from minicpm_kernels_testing.sm90_compile import compile_sm90, resources
from minicpm_kernels_testing.cases.attention import gluon_forward_cases
for case in gluon_forward_cases():
    half = {name: type_.replace("bf16[", "fp16[") for name, type_ in case.types.items()}
    for variant in (case, dataclasses.replace(case, types=half)):
        for problem in resources(compile_sm90(variant)).broken_limits(needs_tensor_cores=True):
            print(case.name, problem)
""")
    assert problems == ""


@pytest.mark.slow
def test_softmax_runs_beside_products(run_where_triton_compiles: Callable[[str], str]) -> None:
    """Between the waits for the scores and for the product with the values stand the search for the maximum (head dim
    64) and most exponentials (128), in the two loops of every consumer: the assembler may move waits, and once
    did."""
    counts = run_where_triton_compiles("""
import re
import tempfile
from minicpm_kernels_testing.sm90_compile import compile_sm90, cuobjdump
from minicpm_kernels_testing.cases.attention import gluon_forward_cases
for case, instruction in zip(gluon_forward_cases(), ("FMNMX", "MUFU.EX2"), strict=True):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compile_sm90(case).asm["cubin"])
        file.flush()
        sass = cuobjdump("--dump-sass", file.name)
    between = re.findall(r"DEPBAR.LE gsb0, 0x1 (.*?)DEPBAR.LE gsb0, 0x0 ", sass, re.DOTALL)
    print(*(text.count(instruction) for text in between))
""")
    head_dim_64, head_dim_128 = ([int(count) for count in line.split()] for line in counts.splitlines())
    assert len(head_dim_64) == 6
    assert min(head_dim_64) >= 60
    assert len(head_dim_128) == 4
    assert min(head_dim_128) >= 60
