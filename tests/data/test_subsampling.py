"""Fewer steps hold what happened in all of them."""

from __future__ import annotations

import numpy as np
import pytest

from flowpolicy.data.importers.request import requested_every, requested_size
from flowpolicy.data.importers.subsampling import Subsampling
from flowpolicy.errors import ConfigError


@pytest.mark.parametrize("block", [1, 2, 5, 100])
@pytest.mark.parametrize("every", [2, 3, 7])
def test_each_episode_keeps_its_first_step_its_rewards_and_its_end(every: int, block: int):
    lengths = np.array([7, 1, 9, 3])
    step = np.arange(lengths.sum())
    ended = np.isin(step, np.cumsum(lengths) - 1)
    rows = {"action": step.reshape(-1, 1), "reward": step.astype(np.float32), "terminated": ended}
    cut = [{k: v[i : i + block] for k, v in rows.items()} for i in range(0, len(step), block)]
    subsampling = Subsampling(every, lengths)
    kept = list(subsampling.blocks(cut))
    found = {key: np.concatenate([rows[key] for rows in kept]) for key in rows}
    starts = np.cumsum(lengths) - lengths
    wanted = [start + at for start, n in zip(starts, lengths, strict=True) for at in range(0, n, every)]
    assert found["action"][:, 0].tolist() == wanted
    assert len(wanted) == subsampling.lengths.sum()
    assert found["terminated"].dtype == bool
    assert np.flatnonzero(found["terminated"]).tolist() == (np.cumsum(subsampling.lengths) - 1).tolist()
    episode = np.repeat(np.arange(4), subsampling.lengths)
    returns = np.bincount(episode, found["reward"])
    np.testing.assert_array_equal(returns, np.add.reduceat(step, starts))


@pytest.mark.parametrize("size", [[16], [0, 16], 16, [16, 9999], ["a", 3], [16.0, 16.0]])
def test_an_impossible_size_is_refused(size: object):
    with pytest.raises(ConfigError, match="image_size"):
        requested_size({"image_size": size})  # type: ignore[typeddict-item]


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_an_impossible_number_of_steps_is_refused(every: object):
    with pytest.raises(ConfigError, match="every"):
        requested_every({"every": every})  # type: ignore[typeddict-item]
