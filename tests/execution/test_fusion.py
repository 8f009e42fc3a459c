"""Chunks, and how successive ones become one stream of actions."""

import math

import numpy as np
import pytest

from flowpolicy.errors import ConfigError
from flowpolicy.execution.fusion import (
    Chunk,
    RealTimeChunking,
    Switch,
    TemporalEnsembling,
    build_fusion,
    prefix_weights,
)
from flowpolicy.execution.rotations import Rotation


def chunk(start, delay=0, horizon=6, base=0.0):
    """Action k is (base + k, its tick)."""
    rows = [[base + k, start + k] for k in range(horizon)]
    return Chunk(np.array(rows, dtype=np.float32), start, start + delay)


@pytest.mark.parametrize("name", ["switch", "ensemble", "rtc"])
def test_every_strategy_executes_the_action_sampled_for_the_tick(name):
    # Chunks that agree on every tick become their common trajectory, whatever the strategy and the delays.
    fusion = build_fusion(name, 6, 2, 3)
    assert fusion.name == name
    assert fusion.action(0) is None
    for start, delay in ((0, 1), (2, 3), (4, 0), (5, 3)):
        fusion.add(chunk(start, delay))
        for tick in range(start + delay, start + 6):
            assert fusion.action(tick)[1] == tick
        assert fusion.action(start + 6) is None
    fusion.reset()
    assert fusion.action(6) is None
    assert fusion.prefix(6) is None


def test_a_chunk_knows_its_ticks():
    one = chunk(10, 2)
    assert (one.delay, one.end) == (2, 16)
    assert one.at(9) is None
    assert one.at(16) is None
    assert one.at(12).tolist() == [2, 12]


def test_switching_skips_what_is_in_the_past_and_takes_no_older_chunk():
    fusion = Switch()
    fusion.add(chunk(0))
    fusion.add(chunk(4, 2, base=100))
    assert fusion.action(6).tolist() == [102, 6]
    fusion.add(chunk(2, 5, base=200))  # asked for earlier, arrived later
    assert fusion.action(7).tolist() == [103, 7]


@pytest.mark.parametrize("late", [False, True])
def test_ensembling_is_the_mean_in_which_the_oldest_chunk_counts_most(late):
    fusion = TemporalEnsembling(decay=0.5)
    chunks = [chunk(0), chunk(2, base=10), chunk(3, base=100)]
    for one in reversed(chunks) if late else chunks:
        fusion.add(one)
    weights = [1.0, math.exp(-0.5), math.exp(-1.0)]
    expected = sum(w * v for w, v in zip(weights, [4, 12, 101], strict=True)) / sum(weights)
    assert fusion.action(4) == pytest.approx([expected, 4])
    # The first has ended: the second is the oldest now.
    assert fusion.action(6) == pytest.approx([(14 + weights[1] * 103) / (1 + weights[1]), 6])


def around(axis, angle):
    return np.asarray(axis, np.float64) / np.linalg.norm(axis) * angle


@pytest.mark.parametrize("axis", [(1, 0, 0), (1, 2, -1)])
def test_declared_rotations_are_averaged_as_rotations(axis):
    def mean(kind, *rows):
        fusion = TemporalEnsembling(0.0, rotations=(Rotation(kind, 0),))
        for start, row in enumerate(rows):
            fusion.add(Chunk(np.tile(np.asarray(row, np.float32), (4, 1)), start, start))
        return fusion.action(len(rows) - 1)

    # Nearly half a turn, either way around: the same rotation but for 0.083 rad.
    for one, other in ((3.1, -3.1), (-3.1, 3.1)):
        found = mean("rotation_vector", around(axis, one), around(axis, other))
        assert found == pytest.approx(around(axis, np.copysign(np.pi, other)), abs=1e-4)
        assert mean("angle", [one], [other]) == pytest.approx([np.copysign(np.pi, other)], abs=1e-4)
    near = mean("rotation_vector", around(axis, 0.1), around(axis, 0.3))
    assert near == pytest.approx(around(axis, 0.2), abs=1e-5)
    quaternion = np.array([np.cos(0.2), *around(axis, np.sin(0.2))])
    assert mean("quaternion", quaternion, -quaternion) == pytest.approx(-quaternion, abs=1e-6)
    assert mean("rotation_vector", np.zeros(3), np.zeros(3)) == pytest.approx(np.zeros(3))


def test_without_a_declaration_chunks_that_disagree_are_not_averaged():
    fusion = build_fusion("ensemble", 6, 2, 3, np.array([6.4, 6.4], np.float32))
    fusion.add(Chunk(np.tile(np.array([[3.1, 0.1]], np.float32), (6, 1)), 0, 0))
    fusion.add(Chunk(np.tile(np.array([[-3.1, 0.3]], np.float32), (6, 1)), 1, 1))
    assert fusion.action(1) == pytest.approx([-3.1, 0.2], abs=1e-3)


def test_weights_by_hand():
    # Equation 5 with H = 6, d = 2, s = 2: c = (4 - i) / 3 for i = 2, 3.
    c = np.array([2 / 3, 1 / 3])
    soft = c * (np.exp(c) - 1) / (math.e - 1)
    assert prefix_weights(6, 2, 4) == pytest.approx([1, 1, *soft, 0, 0])


@pytest.mark.parametrize(
    ("horizon", "frozen", "overlap"), [(8, 0, 8), (8, 0, 5), (8, 3, 5), (8, 5, 5), (8, 7, 4)]
)
def test_weights_fall_from_one_to_nothing(horizon, frozen, overlap):
    weights = prefix_weights(horizon, frozen, overlap)
    assert (weights[: min(frozen, overlap)] == 1).all()
    assert (weights[overlap:] == 0).all()
    assert (weights[:overlap] > 0).all()
    assert (np.diff(weights[min(frozen, overlap) : overlap + 1]) < 0).all()


def test_real_time_chunking_asks_for_the_rest_of_the_chunk_with_the_expected_delay_frozen():
    fusion = RealTimeChunking(6, memory=3)
    assert fusion.prefix(0) is None
    fusion.add(chunk(0, 2))
    prefix = fusion.prefix(2)
    assert prefix.actions.tolist() == [[2, 2], [3, 3], [4, 4], [5, 5], [0, 0], [0, 0]]
    assert np.array_equal(prefix.weights, prefix_weights(6, 2, 4))
    fusion.add(chunk(2, 1))
    assert np.array_equal(fusion.prefix(3).weights, prefix_weights(6, 1, 5))
    fusion.reset()  # another episode on the same machine: its delays stay
    fusion.add(chunk(4, 2))
    assert np.array_equal(fusion.prefix(6).weights, prefix_weights(6, 1, 4))
    assert fusion.prefix(10) is None


@pytest.mark.parametrize(
    ("delays", "expected"),
    [
        ([8, 1, 1, 1], [8, 1, 1, 1]),  # the first while a worker warms up
        ([1, 1, 8, 1, 1], [1, 1, 1, 1, 1]),  # one out of the ordinary
        ([1, 1, 2, 1, 2, 1], [1, 1, 1, 1, 2, 2]),  # what happens often is expected
        ([1, 1, 1, 4, 4, 4], [1, 1, 1, 1, 4, 4]),
    ],
)
def test_a_delay_out_of_the_ordinary_freezes_nothing(delays, expected):
    fusion = RealTimeChunking(16)
    found = []
    for tick, delay in enumerate(delays):
        fusion.add(chunk(tick, delay, horizon=16))
        found.append(int((fusion.prefix(tick).weights == 1).sum()))
    assert found == expected
    fusion.reset()
    fusion.add(chunk(20, 8, horizon=16))
    assert (fusion.prefix(20).weights == 1).sum() == expected[-1]


def test_a_chunk_that_the_robot_waited_for_is_no_measure_of_the_delay():
    fusion = RealTimeChunking(16)
    fusion.add(Chunk(np.zeros((16, 2), np.float32), 0, 0, waited=3))  # it took three ticks: the best known
    assert (fusion.prefix(0).weights == 1).sum() == 3
    for start in (1, 2):
        fusion.add(chunk(start, 2, horizon=16))
    for start in (3, 4):
        fusion.add(Chunk(np.zeros((16, 2), np.float32), start, start, waited=5))
    assert (fusion.prefix(4).weights == 1).sum() == 2


def test_a_chunk_that_would_end_before_the_next_arrives_is_refused():
    build_fusion("rtc", 8, 4, 4)
    with pytest.raises(ConfigError, match=r"execute_horizon \+ max_delay is 9; it must be at most .* 8"):
        build_fusion("rtc", 8, 4, 5)
    for execute_horizon, max_delay in ((0, 0), (2, -1)):
        with pytest.raises(ConfigError):
            build_fusion("switch", 8, execute_horizon, max_delay)
    with pytest.raises(ConfigError, match="did you mean 'switch'"):
        build_fusion("swich", 8, 4, 4)
    with pytest.raises(ConfigError, match="decay"):
        TemporalEnsembling(-1)
