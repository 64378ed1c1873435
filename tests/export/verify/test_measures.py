"""The figures of a certificate against the plainest way to compute them."""

import math

import numpy as np
import pytest
from minicpm_export.verify.measures import Comparison, log_softmax


def naive(reference, export, targets):
    """Position by position, in Python floats, with math.fsum."""
    kl, agree, nll_p, nll_q = [], 0, [], []
    for p_row, q_row, target in zip(reference.tolist(), export.tolist(), targets.tolist(), strict=True):
        log_p, log_q = naive_log_softmax(p_row), naive_log_softmax(q_row)
        kl.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
        agree += p_row.index(max(p_row)) == q_row.index(max(q_row))
        if target >= 0:
            nll_p.append(-log_p[target])
            nll_q.append(-log_q[target])
    mean = math.fsum(kl) / len(kl)
    perplexities = [math.exp(math.fsum(nll) / len(nll)) for nll in (nll_p, nll_q)]
    return kl, mean, agree / len(kl), *perplexities


def naive_log_softmax(row):
    top = max(row)
    total = math.fsum(math.exp(value - top) for value in row)
    return [value - top - math.log(total) for value in row]


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_figures_equal_the_naive_ones(spread):
    rng = np.random.default_rng(0)
    reference = (rng.standard_normal((150, 90)) * spread).astype(np.float32)
    export = reference + rng.standard_normal((150, 90)).astype(np.float32) * np.float32(0.3)
    targets = rng.integers(0, 90, 150)
    targets[[70, 149]] = -1
    comparison = Comparison()
    for start in (0, 70):  # two windows of unequal length, more rows than are taken at a time
        rows = slice(start, 70 if start == 0 else 150)
        comparison.add(reference[rows], export[rows], targets[rows])
    got = comparison.measures()
    kl, mean, top1, ppl_reference, ppl_export = naive(reference, export, targets)
    assert got.num_positions == 150
    assert got.mean_kl == pytest.approx(mean, rel=1e-9)
    assert got.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-9)
    assert got.max_kl == pytest.approx(max(kl), rel=1e-9)
    assert got.top1_agreement == top1
    assert got.reference_perplexity == pytest.approx(ppl_reference, rel=1e-9)
    assert got.export_perplexity == pytest.approx(ppl_export, rel=1e-9)
    assert got.max_logit_difference == pytest.approx(float(np.abs(reference - export).max()), rel=1e-5)
    assert got.logit_std == pytest.approx(float(np.sqrt(reference.var(axis=1).mean())), rel=1e-4)


def test_equal_logits_are_no_distance_apart():
    logits = np.random.default_rng(1).standard_normal((5, 40)).astype(np.float32)
    comparison = Comparison()
    comparison.add(logits, logits + np.float32(0), np.arange(5))
    got = comparison.measures()
    assert (got.mean_kl, got.p99_kl, got.top1_agreement, got.max_logit_difference) == (0.0, 0.0, 1.0, 0.0)


def test_a_constant_added_to_all_logits_changes_nothing_but_the_logits():
    logits = np.random.default_rng(2).standard_normal((5, 40)).astype(np.float32)
    comparison = Comparison()
    comparison.add(logits, logits + np.float32(3), np.arange(5))
    got = comparison.measures()
    assert got.mean_kl < 1e-12
    assert got.max_logit_difference == pytest.approx(3, abs=1e-5)


def test_huge_logits_neither_overflow_nor_lose_the_tail():
    row = np.array([[3e4, 0.0, -3e4]], dtype=np.float32)
    np.testing.assert_array_equal(log_softmax(row), [[0.0, -3e4, -6e4]])


def test_a_nan_shows_in_every_figure_it_touches():
    logits = np.zeros((4, 8), dtype=np.float32)
    broken = logits.copy()
    broken[1, 2] = np.nan
    comparison = Comparison()
    comparison.add(logits, broken, np.zeros(4, dtype=np.int64))
    comparison.add(logits, logits, np.zeros(4, dtype=np.int64))
    got = comparison.measures()
    assert math.isnan(got.mean_kl) and math.isnan(got.max_logit_difference)


def test_shapes_that_do_not_fit_are_refused():
    comparison = Comparison()
    with pytest.raises(ValueError, match="shape"):
        comparison.add(np.zeros((2, 8), np.float32), np.zeros((2, 9), np.float32), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="no window"):
        comparison.measures()
