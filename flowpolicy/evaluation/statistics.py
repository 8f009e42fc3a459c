"""How sure a number is: intervals of a success rate, of a mean, and of a paired difference."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowpolicy.errors import FlowPolicyError

Interval = tuple[float, float]

RESAMPLES = 10_000
_BLOCK = 4_000_000  # resampled values held in memory at once


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Score interval of a success rate, in [0, 1]; it stays informative at 0 and at all successes.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Args:
        successes: episodes that succeeded.
        trials: all episodes, at least 1.
        confidence: share of intervals that hold the true rate.

    Raises:
        FlowPolicyError: when there are no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise FlowPolicyError(
            f"{successes} successes in {trials} trials make no rate; "
            "give at least one trial and no more successes than trials."
        )
    z2 = _normal_quantile(confidence) ** 2
    rate = successes / trials
    centre = rate + z2 / (2 * trials)
    half = math.sqrt(z2) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    # At the ends the bound is exactly 0 or 1; rounding would leave a stray 1e-17.
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == trials else min(1.0, (centre + half) / scale)
    return low, high


def mean_interval(
    values: ArrayLike, confidence: float = 0.95, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Bootstrap interval of a mean, corrected for bias and skew (BCa).

    Source: Efron 1987, "Better bootstrap confidence intervals". Of a mean the acceleration is the
    sample's skewness / (6 sqrt(n)), which is what the jackknife gives.

    Args:
        values: (n,) one number per episode, finite.
        confidence: share of intervals that hold the true mean.
        seed: of the resampling; the same values and seed give the same interval.
        resamples: bootstrap samples drawn.

    Returns:
        (low, high) in the unit of ``values``; (nan, nan) of a single value, which says nothing of spread.

    Raises:
        FlowPolicyError: when there are no values or one is not finite.
    """
    sample = _finite(values)
    mean = float(sample.mean())
    if sample.size == 1:
        return math.nan, math.nan
    deviations = sample - mean
    spread = float(np.sqrt((deviations**2).sum()))
    # Below rounding error the values are one value, and the "spread" is noise of the summation.
    if spread <= 1e-12 * max(1.0, abs(mean)) * math.sqrt(sample.size):
        return mean, mean
    means = _resampled_means(sample, seed, resamples)
    below = np.count_nonzero(means < mean) + 0.5 * np.count_nonzero(means == mean)
    share = min(max(below / resamples, 0.5 / resamples), 1 - 0.5 / resamples)
    normal = NormalDist()
    bias = normal.inv_cdf(share)
    acceleration = float((deviations**3).sum()) / (6 * spread**3)
    levels = []
    for sign in (-1, 1):
        shifted = bias + sign * _normal_quantile(confidence)
        # Far out in the tail of a very skewed sample the correction has a pole; stop short of it.
        levels.append(normal.cdf(bias + shifted / max(1 - acceleration * shifted, 1e-6)))
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def paired_difference_interval(
    first: ArrayLike,
    second: ArrayLike,
    confidence: float = 0.95,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Bootstrap interval of mean(first - second), where entry i of both comes from the same seed.

    What the two share (the start, the noise x_0) cancels, so this is narrower than two intervals apart.

    Args:
        first: (n,) one number per episode.
        second: (n,) the other policy's numbers on the same seeds, in the same order.
        confidence: share of intervals that hold the true difference.
        seed: of the resampling.
        resamples: bootstrap samples drawn.

    Raises:
        FlowPolicyError: when the lengths differ, there are no values, or one is not finite.
    """
    left, right = _finite(first), _finite(second)
    if left.size != right.size:
        raise FlowPolicyError(
            f"A paired comparison needs the same episodes on both sides, not {left.size} and {right.size}."
        )
    return mean_interval(left - right, confidence, seed=seed, resamples=resamples)


def _resampled_means(sample: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // sample.size)
    parts = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        picks = generator.integers(0, sample.size, size=(rows, sample.size), dtype=np.int32)
        parts.append(sample[picks].mean(axis=1))
    return np.concatenate(parts)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    sample: NDArray[Any] = np.asarray(values, dtype=np.float64).reshape(-1)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise FlowPolicyError("An interval needs at least one value, and finite values only.")
    return sample


def _normal_quantile(confidence: float) -> float:
    """Half-width of the central ``confidence`` of a standard normal: 1.96 of 0.95."""
    if not 0 < confidence < 1:
        raise FlowPolicyError(f"confidence is {confidence}; it must lie between 0 and 1, e.g. 0.95.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
