import math

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed")

from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.statistics import (
    mean_interval,
    mean_interval_by_seed,
    paired_difference_interval,
    seeds_interval,
    success_interval_by_seed,
    wilson_interval,
)


def test_wilson_equals_its_published_values():
    # 81 of 263 successes is the worked example of Newcombe (1998), table I: .2553 to .3662.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_covers_the_true_rate_as_often_as_it_claims():
    binomial = np.random.default_rng(0).binomial(50, 0.85, size=4000)
    bounds = {k: wilson_interval(int(k), 50) for k in np.unique(binomial)}
    covered = np.mean([bounds[k][0] <= 0.85 <= bounds[k][1] for k in binomial])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(FlowPolicyError, match="make no rate"):
        wilson_interval(successes, trials)


def test_mean_interval_of_normal_values_is_near_the_analytic_one():
    sample = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    half = 1.96 * sample.std(ddof=1) / math.sqrt(400)
    assert mean_interval(sample) == pytest.approx(
        (sample.mean() - half, sample.mean() + half), abs=0.08 * half
    )


def test_mean_interval_covers_the_true_mean_as_often_as_it_claims():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        low, high = mean_interval(generator.gamma(2.0, size=40), seed=trial, resamples=600)
        covered += low <= 2.0 <= high
    assert 0.90 <= covered / 400 <= 0.975


def test_mean_interval_is_repeatable_and_scales_with_the_values():
    sample = np.random.default_rng(0).normal(size=30)
    assert mean_interval(sample, seed=4) == mean_interval(sample, seed=4)
    assert mean_interval(sample, seed=4) != mean_interval(sample, seed=5)
    low, high = mean_interval(sample, seed=4)
    assert mean_interval(10 * sample + 3, seed=4) == pytest.approx((10 * low + 3, 10 * high + 3))


def test_degenerate_samples():
    assert mean_interval([0.1] * 7) == pytest.approx((0.1, 0.1))
    assert all(math.isnan(bound) for bound in mean_interval([3.0]))
    for broken in ([], [1.0, math.nan]):
        with pytest.raises(FlowPolicyError):
            mean_interval(broken)
    low, high = mean_interval([0.0] * 99 + [1e9])  # one outlier: a finite, ordered interval inside the range
    assert 0 <= low <= high <= 1e9


def test_pairing_removes_what_both_policies_share():
    generator = np.random.default_rng(0)
    start = generator.normal(0, 100, size=50)
    first, second = start + generator.normal(1.0, 0.5, 50), start + generator.normal(0.0, 0.5, 50)
    low, high = paired_difference_interval(first, second)
    assert 0.5 < low < 1.0 < high < 1.5
    assert paired_difference_interval(second, first) == pytest.approx((-high, -low), abs=0.03)
    with pytest.raises(FlowPolicyError, match="same episodes"):
        paired_difference_interval(first, second[:-1])


def test_the_interval_over_seeds_is_students():
    published = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 10: 2.228, 30: 2.042}
    for freedom, value in published.items():
        means = np.arange(freedom + 1.0)
        half = value * means.std(ddof=1) / math.sqrt(freedom + 1)
        assert seeds_interval(means) == pytest.approx(
            (means.mean() - half, means.mean() + half), abs=1e-3 * half
        )


def test_five_seeds_are_five_values_however_many_episodes_each_has():
    rates = [0.49, 0.55, 0.34, 0.57, 0.42]
    episodes = [np.repeat([1, 0], [round(100 * rate), 100 - round(100 * rate)]) for rate in rates]
    for found in (
        seeds_interval(rates), mean_interval_by_seed(episodes), success_interval_by_seed(episodes),
        success_interval_by_seed([np.tile(part, 10) for part in episodes]),
    ):  # fmt: skip
        assert found == pytest.approx((0.356, 0.592), abs=5e-4)
    assert mean_interval_by_seed(episodes[:1]) == mean_interval(episodes[0])
    assert success_interval_by_seed(episodes[:1]) == wilson_interval(49, 100)


def test_an_interval_over_seeds_covers_the_mean_over_all_seeds_where_pooled_episodes_do_not():
    generator = np.random.default_rng(0)
    over_seeds = pooled = 0
    for _ in range(200):
        episodes = [generator.normal(generator.normal(0, 1), 1, size=50) for _ in range(4)]
        low, high = seeds_interval([part.mean() for part in episodes])
        over_seeds += low <= 0 <= high
        low, high = mean_interval(np.concatenate(episodes), resamples=50)
        pooled += low <= 0 <= high
    assert 0.92 <= over_seeds / 200 <= 0.98
    assert pooled / 200 < 0.5


def test_rates_that_are_alike_are_not_certain():
    assert success_interval_by_seed([np.ones(20)] * 3) == wilson_interval(60, 60)
    low, high = success_interval_by_seed([np.repeat([1, 0], [19, 1]), np.ones(20)])
    assert 0.0 <= low < wilson_interval(39, 40)[0]
    assert high == 1.0
