"""How sure a number is: intervals of a success rate, a mean, a paired difference, and over training seeds.

Episodes of one policy say how that policy does. What a method does is told by policies of several training
seeds, and there are as many independent values as seeds, however many episodes each has played.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def seeds_interval(means: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean over training seeds: what another seed may be expected to add to.

    Args:
        means: (n,) one mean per seed, of equally many episodes each.
        confidence: share of intervals that hold the mean over all seeds.

    Returns:
        (low, high); (nan, nan) of a single seed, which says nothing of the others.

    Raises:
        FlowPolicyError: when there are no means or one is not finite.
    """
    sample = _finite(means)
    if sample.size == 1:
        return math.nan, math.nan
    half = student_quantile(confidence, sample.size - 1) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return float(sample.mean()) - half, float(sample.mean()) + half


def mean_interval_by_seed(values: Sequence[ArrayLike], confidence: float = 0.95) -> Interval:
    """Of the mean over training seeds, from each seed's episodes; of one seed, over its episodes.

    Means of few seeds are now and then alike by luck: the interval over seeds is never inside that of all
    episodes together, which says how well these policies are known.

    Args:
        values: for each seed one number per episode, equally many.
        confidence: share of intervals that hold the true mean.
    """
    parts = [_finite(part) for part in values]
    episodes = mean_interval(np.concatenate(parts), confidence)
    if len(parts) == 1:
        return episodes
    return _hull(episodes, seeds_interval([part.mean() for part in parts], confidence))


def success_interval_by_seed(success: Sequence[ArrayLike], confidence: float = 0.95) -> Interval:
    """:func:`mean_interval_by_seed` of a success rate, within [0, 1]; over episodes it is Wilson's interval.

    Args:
        success: for each seed one 0 or 1 per episode, equally many.
        confidence: share of intervals that hold the true rate.
    """
    parts = [_finite(part) for part in success]
    hits, trials = round(sum(part.sum() for part in parts)), sum(part.size for part in parts)
    episodes = wilson_interval(hits, trials, confidence)
    if len(parts) == 1:
        return episodes
    low, high = _hull(episodes, seeds_interval([part.mean() for part in parts], confidence))
    return max(0.0, low), min(1.0, high)


def _hull(first: Interval, second: Interval) -> Interval:
    return min(first[0], second[0]), max(first[1], second[1])


def student_quantile(confidence: float, freedom: int) -> float:
    """Half-width of the central ``confidence`` of Student's t: 2.776 of 0.95 with 4 degrees of freedom."""
    low, high = 0.0, _normal_quantile(confidence)
    while _student_share(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < confidence else (low, middle)
    return high


def _student_share(t: float, freedom: int) -> float:
    """P(|T| < t), a finite sum for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = sine * (cosine if freedom % 2 else 1.0)
    total = term if freedom > 1 else 0.0
    for k in range(2 + freedom % 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + total) if freedom % 2 else total


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
