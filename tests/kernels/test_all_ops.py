"""What holds for every op alike: no second derivative, no wait for the device, no need of Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from minicpm_kernels import (
    attention,
    attention_decode,
    linear_cross_entropy,
    moe_layer,
    rms_norm,
    rms_norm_residual,
    rope,
    rope_tables,
    swiglu,
)
from minicpm_kernels.backend import choose_backend_for_device

TOKENS, WIDTH = 48, 64


def random(*shape, device):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()


def calls(device):
    """By name: a function of its tensors, and these; its result is one tensor."""
    cu_seqlens = torch.tensor([0, 20, TOKENS], dtype=torch.int32, device=device)
    targets = torch.arange(TOKENS, device=device)
    cos, sin = rope_tables(torch.arange(TOKENS, device=device), torch.rand(8, device=device))

    def tensors(*shapes):
        return [random(*shape, device=device) for shape in shapes]

    heads = (TOKENS, 4, 16)
    return {
        "attention": (
            lambda q, k, v: attention(q, k, v, cu_seqlens, max_seqlen=28),
            tensors(heads, (TOKENS, 2, 16), (TOKENS, 2, 16)),
        ),
        "linear_cross_entropy": (
            lambda x, weight: linear_cross_entropy(x, weight, targets).loss_sum,
            tensors((TOKENS, WIDTH), (96, WIDTH)),
        ),
        "moe_layer": (
            lambda x, router, gate_up, down: (
                moe_layer(x, router, gate_up, down, num_experts_per_tok=2).out_ND
            ),
            tensors((TOKENS, WIDTH), (4, WIDTH), (4, 64, WIDTH), (4, WIDTH, 32)),
        ),
        "rms_norm": (
            lambda x, weight: rms_norm(x, weight, eps=1e-5),
            tensors((TOKENS, WIDTH), (WIDTH,)),
        ),
        "rms_norm_residual": (
            lambda x, branch, weight: rms_norm_residual(x, branch, weight, eps=1e-5, branch_scale=0.3)[0],
            tensors((TOKENS, WIDTH), (TOKENS, WIDTH), (WIDTH,)),
        ),
        "rope": (lambda x: rope(x, cos, sin), tensors(heads)),
        "swiglu": (swiglu, tensors((TOKENS, WIDTH))),
    }


NAMES = tuple(calls("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name, device, backend):
    """It would be silently wrong: the backward passes are ops or plain arithmetic on tensors without history."""
    op, inputs = calls(device)[name]
    gradients = torch.autograd.grad(op(*inputs).float().square().sum(), inputs, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"once_differentiable|does not require grad|not have been used|register_autograd"
    ):
        torch.autograd.grad(sum(g.float().square().sum() for g in gradients), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name, device, triton_kernels):
    if device.type != "cuda":
        pytest.skip("needs a card")
    op, inputs = calls(device)[name]

    def step():
        return torch.autograd.grad(op(*inputs).sum(), inputs)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, step())


@pytest.mark.parametrize("name", NAMES)
def test_the_current_device_may_be_another(name, device, triton_kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    op, inputs = calls(torch.device("cuda:1"))[name]
    with torch.cuda.device(0):
        gradients = torch.autograd.grad(op(*inputs).sum(), inputs)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_decode_compiles_to_one_graph(device, backend):
    q, k, v = (random(2, *shape, device=device).detach() for shape in ((4, 16), (9, 2, 16), (9, 2, 16)))
    lengths = torch.tensor([3, 9], dtype=torch.int32, device=device)
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, lengths), attention_decode(q, k, v, lengths))


def test_cuda_takes_triton_and_a_cpu_plain_torch(monkeypatch):
    monkeypatch.delenv("MINICPM_KERNELS", raising=False)
    assert choose_backend_for_device("cuda", "rope").name == "triton"
    assert choose_backend_for_device("cpu", "rope").name == "reference"
    monkeypatch.setattr("minicpm_kernels.backend.triton_importable", lambda: False)
    assert choose_backend_for_device("cuda", "rope").name == "reference"


@pytest.mark.slow
def test_everything_runs_without_triton():
    program = f"""
import sys
sys.modules["triton"] = None
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
import torch, test_all_ops
for op, inputs in test_all_ops.calls("cpu").values():
    torch.autograd.grad(op(*inputs).sum(), inputs)
print("ran")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "ran\n", result.stderr


@pytest.mark.slow
def test_the_session_is_empty_without_triton():
    """A platform without it (macOS) collects nothing here, and says so instead of ending in a traceback."""
    folder = str(Path(__file__).parent)
    program = f"""
import sys
sys.modules["triton"] = None
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {folder!r}]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, result.stdout + result.stderr
    assert "no tests ran" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
