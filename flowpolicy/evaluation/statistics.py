"""Confidence intervals of a success rate, a mean, a paired difference, and over training seeds.

Episodes of one policy measure that policy. A method is measured by policies of several training seeds, which
are as many independent values as there are seeds, regardless of the number of episodes of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowpolicy.errors import FlowPolicyError
from flowpolicy.optional import optional

Interval = tuple[float, float]

PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9, "max": 100.0}
RESAMPLES = 10_000
_BLOCK = 4_000_000  # resampled values held in memory at once


def percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    """p50, p95, p99, p99.9 and max, each an observed value: the higher one where it falls between two."""
    return {name: float(np.percentile(values, at, method="higher")) for name, at in PERCENTILES.items()}


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
    _check_confidence(confidence)
    found = _scipy_stats().binomtest(successes, trials).proportion_ci(confidence, "wilson")
    return float(found.low), float(found.high)


def mean_interval(
    values: ArrayLike, confidence: float = 0.95, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Bootstrap interval of a mean, corrected for bias and skew (BCa).

    Source: Efron 1987, "Better bootstrap confidence intervals".

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
    _check_confidence(confidence)
    if sample.size == 1:
        return math.nan, math.nan
    mean = float(sample.mean())
    # Below rounding error the values are one value, and the "spread" is noise of the summation.
    if sample.std() <= 1e-12 * max(1.0, abs(mean)):
        return mean, mean
    found = _scipy_stats().bootstrap(
        (sample,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _BLOCK // sample.size),
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


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
    _check_confidence(confidence)
    quantile = _scipy_stats().t.ppf(0.5 + confidence / 2, sample.size - 1)
    half = float(quantile * sample.std(ddof=1) / math.sqrt(sample.size))
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


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    sample: NDArray[Any] = np.asarray(values, dtype=np.float64).reshape(-1)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise FlowPolicyError("An interval needs at least one value, and finite values only.")
    return sample


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise FlowPolicyError(f"confidence is {confidence}; it must lie between 0 and 1, e.g. 0.95.")


def _scipy_stats() -> Any:
    """``scipy.stats``, which takes a second to import and which only intervals need."""
    with optional("Intervals need scipy", "train"):
        from scipy import stats
    return stats
