"""Fits with intervals: an optimum over learning rates, the batch-size law, the scaling law.

Every interval is a bootstrap's: the middle 90 % of the values that resampled data give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.errors import UserError

Array = NDArray[np.float64]
COVERAGE = 0.9
SAMPLES = 200
EXPONENTS = (0.01, 3.0)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and where the middle 90 % of the bootstrap's lie."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(value: float, samples: Sequence[float] | Array) -> Interval:
        finite = np.asarray(samples, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        low, high = (
            np.quantile(finite, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]) if len(finite) else (value, value)
        )
        return Interval(value=value, low=float(low), high=float(high))

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def parabola_minimum(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Where the parabola through the lowest point and its two neighbours on each side is lowest; within their range.

    Points that are not finite (diverged runs) are left out. At an end of the range, that end.

    Raises:
        UserError: for fewer than three points that are finite.
    """
    order = np.argsort(np.asarray(x, dtype=np.float64))
    xs, ys = np.asarray(x, dtype=np.float64)[order], np.asarray(y, dtype=np.float64)[order]
    xs, ys = xs[np.isfinite(ys)], ys[np.isfinite(ys)]
    if len(xs) < 3:
        raise UserError("an optimum needs at least three values that trained to the end")
    lowest = int(ys.argmin())
    near = slice(max(0, lowest - 2), lowest + 3)
    a, b, _ = np.polyfit(xs[near], ys[near], 2)
    if a <= 0:
        return float(xs[lowest])
    return float(np.clip(-b / (2 * a), xs[near][0], xs[near][-1]))


def optimum(x: Sequence[float], scores: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """The ``x`` (on a log scale) of the lowest score, with ``scores[i]`` those of the seeds at ``x[i]``."""
    logs = np.log(np.asarray(x, dtype=np.float64))
    best = parabola_minimum(logs, [float(np.mean(values)) for values in scores])
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(SAMPLES):
        drawn = [float(np.mean(generator.choice(values, len(values)))) for values in scores]
        if np.isfinite(drawn).sum() >= 3:
            samples.append(parabola_minimum(logs, drawn))
    interval = Interval.of(best, samples)
    return Interval(value=math.exp(best), low=math.exp(interval.low), high=math.exp(interval.high))


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = scale · x^exponent."""

    scale: float
    exponent: float

    def __call__(self, x: float) -> float:
        return float(self.scale * x**self.exponent)


def fit_power_law(x: Sequence[float] | Array, y: Sequence[float] | Array) -> PowerLaw:
    """Least squares between the logarithms.

    Raises:
        UserError: for fewer than two different ``x``.
    """
    if len(set(map(float, x))) < 2:
        raise UserError("a power law needs at least two points")
    exponent, log_scale = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(scale=float(math.exp(log_scale)), exponent=float(exponent))


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """L(N, D) = C_N · N^−α + C_D · D^−β + L0, with N parameters and D tokens, both in 1e9 (paper, section 4.5)."""

    c_n: float
    alpha: float
    c_d: float
    beta: float
    l_0: float

    def __call__(self, n: float | Array, d: float | Array) -> float | Array:
        return self.c_n * n**-self.alpha + self.c_d * d**-self.beta + self.l_0

    def tokens_per_parameter(self, compute: float) -> float:
        """D_opt / N_opt at a compute of ``compute`` · 1e18 FLOPs, C = 6 N D (paper, equation 6).

        NaN for a law without one of its terms, which has no best ratio.
        """
        if not (self.c_n > 0 and self.c_d > 0):
            return math.nan
        k = (self.alpha * self.c_n / (self.beta * self.c_d)) ** (1 / (self.alpha + self.beta))
        eta = (self.beta - self.alpha) / (self.alpha + self.beta)
        return float(1.0 / (k**2 * (compute / 6) ** eta))


def fit_scaling_law(n: Sequence[float], d: Sequence[float], loss: Sequence[float]) -> ScalingLaw:
    """Variable projection: for each (α, β) the three coefficients are a nonnegative least-squares fit; a Huber loss.

    The Huber loss's threshold is the spread of the residuals of a plain fit, so that single runs gone wrong do not
    bend the law.

    Raises:
        UserError: for fewer than six points, two sizes or two lengths.
    """
    from scipy.optimize import minimize, nnls

    ns, ds, losses = (np.asarray(values, dtype=np.float64) for values in (n, d, loss))
    if len(losses) < 6 or len(set(ns)) < 2 or len(set(ds)) < 2:
        raise UserError("a scaling law needs at least six points of two sizes and two lengths")

    def project(exponents: Array, threshold: float) -> tuple[Array, float]:
        alpha, beta = _bounded(exponents)
        design = np.stack([ns**-alpha, ds**-beta, np.ones_like(ns)], axis=1)
        weights = np.ones_like(ns)
        for _ in range(1 if math.isinf(threshold) else 8):
            root = np.sqrt(weights)
            coefficients, _ = nnls(design * root[:, None], losses * root)
            residuals = np.abs(design @ coefficients - losses)
            weights = np.minimum(1.0, threshold / np.maximum(residuals, 1e-12))
        if math.isinf(threshold):
            return coefficients, float((residuals**2).sum())
        inside = residuals <= threshold
        huber = np.where(inside, residuals**2 / 2, threshold * (residuals - threshold / 2))
        return coefficients, float(huber.sum())

    def best(threshold: float, starts: Sequence[tuple[float, float]]) -> Array:
        found = [
            minimize(
                lambda e: project(e, threshold)[1],
                np.log(start),
                method="Nelder-Mead",
                options={"xatol": 1e-6, "fatol": 1e-14, "maxiter": 4000},
            )
            for start in starts
        ]
        return np.asarray(min(found, key=lambda result: result.fun).x)

    exponents = best(math.inf, [(a, b) for a in (0.15, 0.4, 0.9) for b in (0.15, 0.4, 0.9)])
    coefficients, _ = project(exponents, math.inf)
    alpha, beta = _bounded(exponents)
    residuals = coefficients @ np.stack([ns**-alpha, ds**-beta, np.ones_like(ns)]) - losses
    spread = 1.4826 * float(np.median(np.abs(residuals)))
    if spread > 1e-9:
        exponents = best(1.345 * spread, [(float(alpha), float(beta))])
        coefficients, _ = project(exponents, 1.345 * spread)
        alpha, beta = _bounded(exponents)
    return ScalingLaw(
        c_n=float(coefficients[0]),
        alpha=float(alpha),
        c_d=float(coefficients[1]),
        beta=float(beta),
        l_0=float(coefficients[2]),
    )


def _bounded(log_exponents: Array) -> tuple[float, float]:
    """(α, β), neither so small that its term is a second L0, nor so large that powers of it overflow."""
    alpha, beta = np.exp(np.clip(log_exponents, *np.log(EXPONENTS)))
    return float(alpha), float(beta)


def bootstrap_scaling_law(
    n: Sequence[float], d: Sequence[float], loss: Sequence[float], *, samples: int = SAMPLES, seed: int = 0
) -> list[tuple[ScalingLaw, Array]]:
    """Laws fitted to points drawn anew, each with its residuals, for intervals of whatever a law says."""
    points = np.stack([n, d, loss], axis=1)
    generator = np.random.default_rng(seed)
    laws: list[tuple[ScalingLaw, Array]] = []
    while len(laws) < samples:
        drawn = points[generator.integers(0, len(points), len(points))]
        if len(set(drawn[:, 0])) < 2 or len(set(drawn[:, 1])) < 2:
            continue
        law = fit_scaling_law(*drawn.T)
        laws.append((law, np.asarray(law(points[:, 0], points[:, 1])) - points[:, 2]))
    return laws


def predicted_interval(
    law: ScalingLaw, laws: Sequence[tuple[ScalingLaw, Array]], n: float, d: float, *, seed: int = 0
) -> Interval:
    """The loss at (N, D) of a run not seen: the laws' spread, and on top the scatter of single runs about a law."""
    generator = np.random.default_rng(seed)
    samples = [float(other(n, d)) - generator.choice(residuals) for other, residuals in laws]
    return Interval.of(float(law(n, d)), samples)


def interval_of(
    law: ScalingLaw, laws: Sequence[tuple[ScalingLaw, Array]], says: Callable[[ScalingLaw], float]
) -> Interval:
    """What a law says, with the bootstrap's interval."""
    return Interval.of(says(law), [says(other) for other, _ in laws])
