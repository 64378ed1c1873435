"""Output projection and cross-entropy in one op, on both backends.

Legend: N tokens, D model, V vocabulary.
"""

import sys

import pytest
import torch
from minicpm_kernels import linear_cross_entropy
from minicpm_kernels.linear_cross_entropy import linear_cross_entropy_op, linear_cross_entropy_reference
from torch.nn import functional as F

IGNORED = -100
SETTINGS = {"logit_scale": 0.5, "z_loss": 1e-2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 tokens, blocks of 8 rows or 256 columns: a few tokens then make several of each."""
    module = sys.modules["minicpm_kernels.linear_cross_entropy"]  # the package gives its name to the function
    monkeypatch.setattr(module, "_CHUNK_TOKENS_GPU", 16)
    monkeypatch.setattr(module, "_CHUNK_TOKENS_CPU", 16)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS_CPU", 0)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1)
    kernel = pytest.importorskip("minicpm_kernels.linear_cross_entropy_triton")
    monkeypatch.setattr(kernel, "MAX_BLOCK", 256)


def case(num_tokens, vocabulary, width, device, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(num_tokens, width, generator=generator)).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device, dtype)
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    targets[1::5] = IGNORED
    return hidden, weight, targets.to(device)


def mean_loss(op, targets, **settings):
    def run(hidden, weight):
        result = op(hidden, weight, targets, **SETTINGS | settings)
        return (result.loss_sum + result.z_loss_sum) / result.num_targets

    return run


def exact_loss(targets):
    """In the precision of its inputs throughout."""

    def run(hidden, weight):
        logits = F.linear(hidden, weight) * SETTINGS["logit_scale"]
        kept = targets != IGNORED
        z_loss = SETTINGS["z_loss"] * logits.logsumexp(-1)[kept].square().mean()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED) + z_loss

    return run


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("shape", [(1, 2, 8), (19, 300, 24), (3, 513, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients(
    shape, scale, dtype, device, backend, poisoned_memory, with_gradients, assert_as_accurate
):
    hidden, weight, targets = case(*shape, device, dtype, scale)
    ours = with_gradients(mean_loss(linear_cross_entropy, targets), (hidden, weight))
    own = with_gradients(mean_loss(linear_cross_entropy_reference, targets), (hidden, weight))
    exact = with_gradients(exact_loss(targets), (hidden, weight), dtype=torch.float64)
    for what, *results in zip(("loss", "d_hidden", "d_weight"), ours, own, exact, strict=True):
        # In bf16 the logits, their gradient and the result are rounded, in torch as here; float32 rounds every sum.
        assert_as_accurate(*results, what=what, roundings=8 if results[0].dtype == torch.float32 else 3)


def test_autocast_multiplies_in_bf16_and_keeps_gradients_float32(
    device, backend, with_gradients, assert_as_accurate
):
    hidden, weight, targets = case(20, 300, 24, device, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = with_gradients(mean_loss(linear_cross_entropy, targets), (hidden, weight))
        own = with_gradients(mean_loss(linear_cross_entropy_reference, targets), (hidden, weight))
    exact = with_gradients(exact_loss(targets), (hidden, weight), dtype=torch.float64)
    assert not torch.equal(ours[0].double(), exact[0])
    for what, *results in zip(("loss", "d_hidden", "d_weight"), ours, own, exact, strict=True):
        assert_as_accurate(*results, what=what)


def test_sums_and_number_of_targets(device, backend):
    hidden, weight, targets = case(20, 300, 24, device, torch.float32)
    result = linear_cross_entropy(hidden, weight, targets, **SETTINGS)
    expected = linear_cross_entropy_reference(hidden, weight, targets, **SETTINGS)
    for ours, reference in zip(result, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference)
    assert int(result.num_targets) == 16


def test_loss_sum_carries_the_gradient_of_both(device, backend):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32)
    hidden.requires_grad_()
    result = linear_cross_entropy(hidden, weight, targets, **SETTINGS)
    assert not result.z_loss_sum.requires_grad
    (ours,) = torch.autograd.grad(3 * result.loss_sum, hidden)
    expected = linear_cross_entropy_reference(hidden, weight, targets, **SETTINGS)
    (reference,) = torch.autograd.grad(3 * (expected.loss_sum + expected.z_loss_sum), hidden)
    torch.testing.assert_close(ours, reference)


def test_gradient_only_where_asked(device, backend, poisoned_memory):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32)
    full = [x.clone().requires_grad_() for x in (hidden, weight)]
    linear_cross_entropy(*full, targets).loss_sum.backward()
    for index in (0, 1):
        inputs = [hidden, weight]
        inputs[index] = inputs[index].clone().requires_grad_()
        linear_cross_entropy(*inputs, targets).loss_sum.backward()
        torch.testing.assert_close(inputs[index].grad, full[index].grad)


def test_evaluation_computes_the_loss_alone(device, backend):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32)
    weight.requires_grad_()
    training = linear_cross_entropy(hidden, weight, targets).loss_sum
    with torch.no_grad():
        evaluation = linear_cross_entropy(hidden, weight, targets).loss_sum
    assert training.requires_grad
    assert not evaluation.requires_grad
    torch.testing.assert_close(evaluation, training.detach())
    _, d_hidden, d_weight = linear_cross_entropy_op(
        hidden, weight, targets, 1.0, 0.0, IGNORED, torch.float32, False, False
    )
    assert d_hidden.numel() == d_weight.numel() == 0


@pytest.mark.parametrize("num_tokens", [0, 20])
def test_nothing_to_learn(num_tokens, device, backend, poisoned_memory, with_gradients):
    hidden, weight, targets = case(num_tokens, 50, 24, device, torch.float32)
    targets.fill_(IGNORED)
    loss, d_hidden, d_weight = with_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, **SETTINGS).loss_sum, (hidden, weight)
    )
    assert loss == 0
    assert d_hidden.shape == hidden.shape
    assert not d_hidden.any()
    assert not d_weight.any()


def test_another_ignore_index(device, backend):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32)
    as_token = torch.where(targets == IGNORED, 7, torch.where(targets == 7, 8, targets))
    with_token = linear_cross_entropy(hidden, weight, as_token, ignore_index=7)
    expected = linear_cross_entropy_reference(hidden, weight, as_token, ignore_index=7)
    torch.testing.assert_close(tuple(with_token), tuple(expected))


def test_a_target_that_is_no_token_never_passes(device, backend):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32)
    targets[0] = 50
    if backend == "triton":
        assert linear_cross_entropy(hidden, weight, targets).loss_sum.isnan()
    elif device.type == "cpu":
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, targets)


def test_logits_far_apart_stay_finite(device, backend, with_gradients):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32, scale=1e5)
    ours = with_gradients(mean_loss(linear_cross_entropy, targets, z_loss=0.0), (hidden, weight))
    exact = with_gradients(mean_loss(linear_cross_entropy_reference, targets, z_loss=0.0), (hidden, weight))
    torch.testing.assert_close(ours, exact)


def test_strided_inputs(device, backend, with_gradients):
    hidden, weight, targets = case(20, 48, 24, device, torch.float32)
    strided = (hidden.t().contiguous().t(), torch.cat([weight, weight], -1)[:, :24])
    spread = torch.stack([targets, targets], 1)[:, 0]
    torch.testing.assert_close(
        with_gradients(mean_loss(linear_cross_entropy, spread), strided),
        with_gradients(mean_loss(linear_cross_entropy, targets), (hidden, weight)),
    )


def test_inputs_are_left_alone_and_bits_repeat(device, backend, with_gradients):
    hidden, weight, targets = case(19, 300, 24, device, torch.bfloat16)
    before = [x.clone() for x in (hidden, weight, targets)]
    runs = [with_gradients(mean_loss(linear_cross_entropy, targets), (hidden, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, targets), before, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_whole_graph_compiles(training, device, backend, with_gradients):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32)
    function = mean_loss(linear_cross_entropy, targets)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    if training:
        expected = with_gradients(function, (hidden, weight))
        torch.testing.assert_close(with_gradients(compiled, (hidden, weight)), expected)
    else:
        torch.testing.assert_close(compiled(hidden, weight), function(hidden, weight))


def test_opcheck(device, backend):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32)
    for needs in ((True, True), (False, False)):
        arguments = (hidden, weight, targets, 0.5, 1e-2, IGNORED, torch.bfloat16, *needs)
        torch.library.opcheck(linear_cross_entropy_op, arguments)


def test_kernel_reads_nothing_behind_the_vocabulary(device, triton_kernels):
    from minicpm_kernels.linear_cross_entropy_triton import gradient_in_place

    buffer = torch.full((6, 384), float("nan"), device=device)
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).to(device)
    buffer[:, :300] = logits
    targets = torch.arange(6, device=device)
    sums = gradient_in_place(buffer[:, :300], targets, 1.0, 0.0, IGNORED, True)
    torch.testing.assert_close(sums[0], F.cross_entropy(logits, targets, reduction="sum"))
    torch.testing.assert_close(buffer[:, :300], logits.softmax(-1) - F.one_hot(targets, 300))


@pytest.mark.parametrize("vocabulary", [73_440, 122_753])
def test_vocabularies_of_minicpm(
    vocabulary, device, backend, monkeypatch, with_gradients, assert_as_accurate
):
    kernel = pytest.importorskip("minicpm_kernels.linear_cross_entropy_triton")
    monkeypatch.setattr(kernel, "MAX_BLOCK", 16_384)
    hidden, weight, targets = case(3, vocabulary, 16, device, torch.bfloat16)
    targets[0] = vocabulary - 1
    wide = (hidden.float(), weight.float())
    exact = with_gradients(exact_loss(targets), wide)
    own = with_gradients(mean_loss(linear_cross_entropy_reference, targets), (hidden, weight))
    ours = with_gradients(mean_loss(linear_cross_entropy, targets), (hidden, weight))
    for what, result, theirs, reference in zip(("loss", "hidden", "weight"), ours, own, exact, strict=True):
        assert_as_accurate(result, theirs, reference, what=what)


def test_offsets_beyond_int32(device, triton_kernels, far_rows):
    from minicpm_kernels.linear_cross_entropy_triton import gradient_in_place

    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    far, targets = far_rows(logits), torch.arange(3, device=device)
    sums = gradient_in_place(far[:, :60], targets, 1.0, 0.0, IGNORED, True)
    torch.testing.assert_close(sums, gradient_in_place(logits[:, :60], targets, 1.0, 0.0, IGNORED, True))
    assert torch.equal(far[:, :60], logits[:, :60])


def test_refuses_what_does_not_fit(device):
    hidden, weight, targets = case(20, 50, 24, device, torch.float32)
    with pytest.raises(ValueError, match="cast one, or use autocast"):
        linear_cross_entropy(hidden.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(V, D\)"):
        linear_cross_entropy(hidden[:, :8], weight, targets)
    with pytest.raises(ValueError, match=r"logit_scale must be positive, not -1\.0"):
        linear_cross_entropy(hidden, weight, targets, logit_scale=-1.0)
    with pytest.raises(ValueError, match="targets must be 20 int64"):
        linear_cross_entropy(hidden, weight, targets.int())
