"""Schedules against brute force, and against cases computed by hand."""

import itertools

import numpy as np
import pytest

from flowpolicy.acceleration.caching.scheduling import (
    adaptive_caching,
    bubbling_union,
    consecutive_caching,
    uniform,
)
from flowpolicy.errors import ConfigError


def choices(size, count):
    """Every set of updates: 0 and count - 1 others."""
    return [(0, *rest) for rest in itertools.combinations(range(1, size), count - 1)]


def segments(updates, size):
    return zip(updates, [*updates[1:], size], strict=True)


@pytest.mark.parametrize("seed", range(50))
def test_adaptive_caching_finds_what_brute_force_finds(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 10))
    count = int(rng.integers(1, size + 1))
    similarity = rng.uniform(-1, 1, (size, size))
    similarity = (similarity + similarity.T) / 2

    def gain(updates):
        return sum(similarity[a, t] for a, end in segments(updates, size) for t in range(a, end))

    found = adaptive_caching(similarity, count)
    assert len(found) == count
    assert gain(found) == pytest.approx(max(map(gain, choices(size, count))), abs=1e-12)


def test_adaptive_caching_recomputes_where_the_outputs_change():
    phases = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])  # alike within a phase, unlike across
    similarity = (phases[:, None] == phases[None, :]).astype(float)
    assert adaptive_caching(similarity, 3) == (0, 3, 7)


def test_the_consecutive_form_takes_the_least_similar_neighbours():
    rng = np.random.default_rng(0)
    similarity = rng.uniform(0, 1, (12, 12))
    neighbours = np.diagonal(similarity, 1)
    lowest = sorted(np.argsort(neighbours)[:3] + 1)
    assert consecutive_caching(similarity, 4) == (0, *lowest)


def test_a_slow_drift_tells_the_two_forms_apart():
    """Neighbours all alike but the ends far apart: the anchor form divides evenly, the other one does not."""
    angle = np.linspace(0, 3, 16)
    similarity = np.cos(angle[:, None] - angle[None, :])
    even = adaptive_caching(similarity, 4)
    assert max(end - start for start, end in segments(even, 16)) <= 5
    uneven = consecutive_caching(similarity, 4)
    assert max(end - start for start, end in segments(uneven, 16)) >= 10


@pytest.mark.parametrize(("size", "count"), [(10, 3), (100, 10), (7, 7), (5, 1)])
def test_uniform_updates_are_spread_evenly(size, count):
    updates = uniform(size, count)
    lengths = [end - start for start, end in segments(updates, size)]
    assert updates[0] == 0
    assert len(updates) == count
    assert max(lengths) - min(lengths) <= 1


KINDS, LAYERS = ["SA", "CA", "FFN"] * 2, [0, 0, 0, 1, 1, 1]
OWN = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6)]


def test_unions_computed_by_hand():
    # The largest error is the last layer's cross-attention: after it comes its own feed-forward block alone.
    error = [1, 2, 3, 4, 9, 5]
    assert bubbling_union(OWN, KINDS, LAYERS, error, 1) == (*OWN[:4], (0, 5, 6), OWN[5])
    # The second largest is the last feed-forward block: a union with itself.
    assert bubbling_union(OWN, KINDS, LAYERS, error, 2) == (*OWN[:4], (0, 5, 6), OWN[5])
    # Then come the last layer's self-attention and the first feed-forward block, which has one more after it.
    assert bubbling_union(OWN, KINDS, LAYERS, error, 4) == (
        *OWN[:2], (0, 3, 6), (0, 4, 6), (0, 5, 6), OWN[5],
    )  # fmt: skip


def test_unions_are_with_the_original_updates():
    """Block 2 grows by block 5's updates; block 0 takes block 2's as they were before."""
    error = [8, 0, 9, 0, 0, 0]
    grown = bubbling_union([(0, 1), (0,), (0, 3), (0,), (0,), (0, 6)], KINDS, LAYERS, error, 2)
    assert grown[2] == (0, 3, 6)
    assert grown[0] == (0, 1, 3, 6)
    alone = bubbling_union([(0, 1), (0,), (0, 3), (0,), (0,), (0, 6)], KINDS, LAYERS, error, 0)
    assert alone == ((0, 1), (0,), (0, 3), (0,), (0,), (0, 6))


@pytest.mark.parametrize("count", [0, 11])
def test_a_number_of_updates_that_cannot_be_is_refused(count):
    with pytest.raises(ConfigError, match="updates is"):
        adaptive_caching(np.eye(10), count)
    with pytest.raises(ConfigError, match="updates is"):
        uniform(10, count)
