"""Labels, and the batches that are made of them."""

import dataclasses

import numpy as np
import pytest
import torch
from toy_preferences import toy_pairs, write_toy_pairs
from toy_training import toy_demonstrations, toy_trainer

from flowpolicy import ConfigError, DataError, FlowPolicy
from flowpolicy.policy.action_space import ActionConfig
from flowpolicy.preferences.labels import Answers, rewards
from flowpolicy.preferences.pairs import Pairs, read_pairs, require_same_actions
from flowpolicy.preferences.sampling import PreferenceSampler


def test_a_return_and_a_function_score_segments_alike_where_they_say_the_same(tmp_path, monkeypatch):
    pairs = toy_pairs()
    (tmp_path / "my_label.py").write_text(
        "def total(segment):\n    assert segment.observation['observation'].shape[1:] == (3,)\n"
        "    return 3 * segment.reward.sum() + 1\n"
        "def nothing(segment):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    by_return, by_function = (rewards(pairs, label, "") for label in ("return", "my_label:total"))
    raw = np.array([pairs.segment(episode).reward.sum() for episode in range(6)]).reshape(3, 2)
    half = (raw[:, 0] - raw[:, 1]) / 2
    np.testing.assert_allclose(by_return, np.stack([half, -half], 1) / np.sqrt(np.mean(half**2)))
    np.testing.assert_allclose(by_function, by_return)
    for label, words in (
        ("my_label:nothing", "gave nan for a segment"),
        ("my_label:missing", "label=my_label:missing cannot be found"),
        ("retrun", "must be return, page, or module:function"),
    ):
        with pytest.raises(ConfigError, match=words):
            rewards(pairs, label, "")


def test_a_persons_answers_are_rewards_and_what_was_not_answered_is_nan(tmp_path):
    pairs = toy_pairs()
    answers = Answers(tmp_path / "toy.zarr.zip", pairs)
    answers.answer(0, "right")
    answers.answer(2, "equal")
    assert answers.path == tmp_path / "toy.labels.json"
    found = rewards(pairs, "page", tmp_path / "toy.zarr.zip")
    np.testing.assert_array_equal(found, [[-1, 1], [np.nan, np.nan], [0, 0]])
    with pytest.raises(DataError, match="labels other pairs"):
        Answers(tmp_path / "toy.zarr.zip", Pairs(_of_another_seed(pairs.demos)))
    answers.path.write_text("[]")
    with pytest.raises(ValueError, match=r"toy.labels.json"):
        Answers(tmp_path / "toy.zarr.zip", pairs)


def _of_another_seed(demos):
    return dataclasses.replace(demos, attributes={"preferences": {"seed": 1}})


@pytest.fixture(scope="module")
def policy():
    return toy_trainer("flow_matching", steps=1).policy


def test_the_preferred_decision_comes_first_and_is_what_the_policy_gave(policy):
    pairs = toy_pairs()  # of 8 and 4, 6 and 8, 4 and 4 steps
    given = np.array([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])  # the last one teaches nothing
    sampler = PreferenceSampler(policy, pairs, given, range(3))
    assert (len(sampler), sampler.num_pairs) == (2 * (2 + 2), 2)
    batch = sampler.batch(torch.arange(8))
    assert batch.reward.tolist() == [1, 0, 1, 0, 2, -1, 2, -1]
    starts = [8, 0, 8, 4, 12, 18, 16, 22]  # of the shorter segment's decisions, some twice
    chunks = torch.from_numpy(pairs.demos.arrays["chunk"][starts])
    torch.testing.assert_close(batch.action, policy.encode(chunks, {}))
    seen = torch.from_numpy(pairs.demos.arrays["observation"][starts])[:, None]
    torch.testing.assert_close(
        batch.observation["observation"], policy.normalize_observations(seen)["observation"]
    )
    assert batch.mask.sum(1).tolist() == [4, 4, 4, 4, 4, 4, 2, 4]
    index = sampler.rows(3, 6, seed=0)
    assert torch.equal(index[1::2], index[0::2] + 1)
    assert not (index[0::2] % 2).any()
    with pytest.raises(DataError, match=r"No pair of .* is left"):
        PreferenceSampler(policy, pairs, np.full((3, 2), np.nan), range(3))


def test_chunks_are_learnt_relative_to_where_they_began_where_the_policy_does(policy):
    space = ActionConfig("relative", (("observation", 1),))
    relative = FlowPolicy(dataclasses.replace(policy.config, actions=space))
    relative.load_normalizers(policy)
    pairs = toy_pairs()
    arrays = pairs.demos.arrays
    for key in ("chunk", "observation"):
        arrays[key] *= 0.1  # within what is demonstrated
    sampler = PreferenceSampler(relative, pairs, np.array([[1.0, 0.0]] * 3), range(3))
    batch = sampler.batch(torch.tensor([0, 1]))
    actions = relative.action_normalizer.denormalize(batch.action).numpy()
    for row, step in enumerate((0, 8)):
        commands = actions[row] + arrays["observation"][step, 1]
        np.testing.assert_allclose(commands, arrays["chunk"][step], atol=1e-5)


def test_other_stores_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no pairs of segments; make some with"):
        Pairs(toy_demonstrations())
    pairs = read_pairs(write_toy_pairs(tmp_path / "toy.zarr", frames=False))
    with pytest.raises(DataError, match=r"chunks of \(4, 1\) .* the policy makes \(8, 1\)"):
        require_same_actions(pairs, (8, 1))
