import numpy as np
import pytest
import torch

from flowpolicy.data.sampling import ChunkSampler, as_tensors, shuffled_index
from flowpolicy.errors import ConfigError, DataError


def numbered(lengths):
    """Observation and action at step s are both s, so that every window can be read off."""
    ends = np.cumsum(lengths)
    steps = torch.arange(int(ends[-1]), dtype=torch.float32)
    return {"a": steps[:, None], "b": -steps[:, None, None].expand(-1, 2, 1)}, steps[:, None] + 0.5, ends


def reference(ends, step, obs_horizon, action_horizon):
    """One window, step by step."""
    start = max([0] + [e for e in ends.tolist() if e <= step])
    end = min(e for e in ends.tolist() if e > step)
    seen = [max(start, step - back) for back in range(obs_horizon - 1, -1, -1)]
    ahead = [min(end - 1, step + n) for n in range(action_horizon)]
    return seen, ahead, [step + n < end for n in range(action_horizon)]


@pytest.mark.parametrize("seed", range(8))
def test_windows_equal_a_loop_over_steps(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, size=rng.integers(1, 7))  # episodes of one step among them
    lengths[0] = 1
    observation, action, ends = numbered(lengths)
    horizons = int(rng.integers(1, 5)), int(rng.integers(1, 12))
    sampler = ChunkSampler(observation, action, ends, *horizons)
    assert len(sampler) == ends[-1]
    batch = sampler.batch(torch.arange(len(sampler)))
    assert batch.observation["b"].shape == (len(sampler), horizons[0], 2, 1)
    for step in range(len(sampler)):
        seen, ahead, inside = reference(ends, step, *horizons)
        assert batch.observation["a"][step, :, 0].tolist() == seen
        assert batch.observation["b"][step, :, 1, 0].tolist() == [-s for s in seen]
        assert batch.action[step, :, 0].tolist() == [n + 0.5 for n in ahead]
        assert batch.mask[step].tolist() == inside


def test_chosen_episodes_only_and_never_across_an_end():
    observation, action, ends = numbered([4, 1, 6, 3])
    sampler = ChunkSampler(observation, action, ends, 3, 5, episodes=[3, 1])
    batch = sampler.batch(torch.arange(len(sampler)))
    assert len(sampler) == len(batch) == 4
    assert set(batch.action.flatten().tolist()) == {4.5, 11.5, 12.5, 13.5}
    owner = np.searchsorted(ends, batch.observation["a"].flatten(1).numpy(), side="right")
    assert (owner == owner[:, :1]).all()
    assert (owner == np.searchsorted(ends, batch.action[..., 0].numpy() - 0.5, side="right")[:, :1]).all()


def test_any_order_and_repetition_of_windows():
    observation, action, ends = numbered([5, 5])
    sampler = ChunkSampler(observation, action, ends, 1, 2)
    index = torch.tensor([9, 0, 9, 4])
    assert sampler.batch(index).action[:, 0, 0].tolist() == [9.5, 0.5, 9.5, 4.5]


def test_no_episode_and_no_horizon_are_refused():
    observation, action, ends = numbered([5])
    with pytest.raises(DataError, match="No episode"):
        ChunkSampler(observation, action, ends, 1, 2, episodes=[])
    with pytest.raises(ConfigError, match="obs_horizon"):
        ChunkSampler(observation, action, ends, 0, 2)
    with pytest.raises(ConfigError, match="action_horizon"):
        ChunkSampler(observation, action, ends, 1, 0)


def test_missing_keys_are_named(demos):
    tensors = as_tensors(demos, ["observation", "goal"], "cpu")
    assert tensors["goal"].dtype == torch.float32
    with pytest.raises(DataError, match=r"'velocity'.*goal, observation"):
        as_tensors(demos, ["velocity"], "cpu")


@pytest.mark.parametrize(("batch_size", "length"), [(3, 10), (10, 10), (7, 3), (64, 5), (1, 1), (4, 12)])
def test_every_epoch_is_a_permutation_whatever_the_batch(batch_size, length):
    epochs = 4
    steps = -(-epochs * length // batch_size)
    stream = torch.cat([shuffled_index(step, batch_size, length, seed=3) for step in range(steps)])
    assert len(stream) == steps * batch_size
    for epoch in range(epochs):
        part = stream[epoch * length : (epoch + 1) * length]
        assert part.sort().values.tolist() == list(range(length))


def test_shuffling_is_a_pure_function_of_step_and_seed():
    wanted = [shuffled_index(step, 8, 50, seed=1) for step in range(20)]
    for step in np.random.default_rng(0).permutation(20):  # any order: a resumed run starts anywhere
        assert torch.equal(shuffled_index(int(step), 8, 50, seed=1), wanted[step])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    shuffled_index(99, 8, 50, seed=1)
    assert torch.equal(torch.rand(1), expected)  # torch's global generator is left alone
    assert not torch.equal(shuffled_index(0, 50, 50, seed=1), shuffled_index(0, 50, 50, seed=2))
    assert not torch.equal(shuffled_index(0, 50, 50, seed=1), shuffled_index(1, 50, 50, seed=1))
