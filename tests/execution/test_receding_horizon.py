import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.execution.receding_horizon import RecedingHorizon

sys.path.insert(0, str(Path(__file__).parent / "evaluation"))
from toys import ToyPolicy


def _observe(*first: float) -> dict[str, np.ndarray]:
    return {"observation": np.array([[value, 0, 0] for value in first], dtype=np.float32)}


def test_first_observation_fills_the_history_and_later_ones_move_through_it():
    policy = ToyPolicy()
    runner = RecedingHorizon(policy, 1, 1)
    runner.reset(0, 0)
    for value in (1.0, 2.0, 3.0):
        runner.actions(_observe(value), [0])
    assert [history[0, :, 0].tolist() for history in policy.seen] == [[1, 1], [1, 2], [2, 3]]
    runner.reset(0, 1)
    runner.actions(_observe(9.0), [0])
    assert policy.seen[-1][0, :, 0].tolist() == [9, 9]


def test_history_also_moves_between_replannings():
    policy = ToyPolicy()
    runner = RecedingHorizon(policy, 1, 3)
    runner.reset(0, 0)
    for value in range(4):
        runner.actions(_observe(float(value)), [0])
    assert policy.seen[1][0, :, 0].tolist() == [2, 3]


def test_actions_follow_the_chunk_and_only_empty_slots_are_replanned_in_one_batch():
    policy = ToyPolicy()
    runner = RecedingHorizon(policy, 3, 3)
    for slot in range(3):
        runner.reset(slot, slot)
    first = runner.actions(_observe(0, 0), [0, 1])
    second = runner.actions(_observe(0, 0, 0), [0, 1, 2])
    third = runner.actions(_observe(0, 0, 0), [2, 1, 0])
    assert policy.batches == [2, 1]
    for row in (0, 1):
        np.testing.assert_allclose(second[row] - policy.noises[0][row, 1].numpy(), 0.01, atol=1e-6)
        np.testing.assert_allclose(first[row], policy.noises[0][row, 0].numpy(), atol=1e-6)
    np.testing.assert_allclose(third[2], policy.noises[0][0, 2].numpy() + 0.02, atol=1e-6)
    runner.actions(_observe(0, 0, 0), [0, 1, 2])
    assert policy.batches == [2, 1, 2]  # slots 0 and 1 have used their three actions, slot 2 two of them
    assert runner.chunks == 5
    assert runner.inference_seconds > 0


def test_noise_of_an_episode_does_not_depend_on_its_neighbours():
    alone, crowded = ToyPolicy(), ToyPolicy()
    single = RecedingHorizon(alone, 1, 2)
    single.reset(0, torch.Generator().manual_seed(7))
    many = RecedingHorizon(crowded, 3, 2)
    for slot, seed in enumerate((5, 6, 7)):
        many.reset(slot, seed)
    for _ in range(4):
        one = single.actions(_observe(0.0), [0])
        three = many.actions(_observe(1.0, 2.0, 0.0), [0, 1, 2])
        np.testing.assert_array_equal(one[0], three[2])
    assert not torch.equal(crowded.noises[0][0], crowded.noises[0][1])
    assert not torch.equal(alone.noises[0], alone.noises[1])


def test_zero_noise_starts_at_the_origin():
    policy = ToyPolicy()
    runner = RecedingHorizon(policy, 1, 4, zero_noise=True)
    runner.reset(0, 0)
    runner.actions(_observe(0.0), [0])
    assert torch.count_nonzero(policy.noises[0]) == 0


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_actions_that_are_not_finite_are_refused(fault):
    runner = RecedingHorizon(ToyPolicy(fault=fault), 1, 1)
    runner.reset(0, 0)
    with pytest.raises(FlowPolicyError, match="damaged"):
        runner.actions(_observe(0.0), [0])
    runner = RecedingHorizon(ToyPolicy(), 1, 1)
    runner.reset(0, 0)
    with pytest.raises(FlowPolicyError, match="environment gave"):
        runner.actions(_observe(float("nan")), [0])


def test_misuse_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match="execute_horizon is 5"):
        RecedingHorizon(ToyPolicy(), 1, 5)
    with pytest.raises(FlowPolicyError, match="reset"):
        RecedingHorizon(ToyPolicy(), 1, 1).actions(_observe(0.0), [0])
    runner = RecedingHorizon(ToyPolicy("pose"), 1, 1)
    runner.reset(0, 0)
    with pytest.raises(FlowPolicyError, match="'pose'"):
        runner.actions(_observe(0.0), [0])
