"""Off-policy fine-tuning: backups with known values, the replay, saved models, and that it learns."""

import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from toy_practice import Reach, make_policy

from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import CheckpointError, ConfigError, DataError
from flowpolicy.finetuning.environments import ChunkStep
from flowpolicy.finetuning.offpolicy.algorithms import ALGORITHMS, DSRL, EXPO, QChunk
from flowpolicy.finetuning.offpolicy.demonstrations import demonstrated
from flowpolicy.finetuning.offpolicy.off_policy import OffPolicy
from flowpolicy.finetuning.offpolicy.replay import ChunkReplay, Transitions
from flowpolicy.models.config import MLPConfig

SMALL = {"members": 3, "critic_hidden": (32,), "batch_size": 32, "learning_starts": 60, "train_freq": 4}
LEARNERS = [
    QChunk(proposals=4, target_proposals=2),
    EXPO(proposals=2, target_proposals=2, edit_hidden=(16,), flow_learning_rate=1e-3),
    DSRL(proposals=2, actor_hidden=(16,)),
]
NAMES = [each.name for each in LEARNERS]


def make(algorithm=LEARNERS[0], env=None, policy=None, **settings):
    env = make_vec_env(Reach, n_envs=4, seed=0) if env is None else env
    defaults = {"num_steps": 2, "seed": 0, "device": "cpu", "gamma": 0.9, "learning_rate": 1e-3}
    policy = policy or make_policy(model=MLPConfig(hidden=16))
    return OffPolicy(policy, env, algorithm=algorithm, **{**defaults, **SMALL, **settings})


def recorded(lengths, terminated=None, reward=True):
    """Episodes whose observation is a hundredth of the step's number, which is its reward."""
    steps = sum(lengths)
    arrays = {
        "observation": np.repeat(np.arange(steps, dtype=np.float32)[:, None], 2, 1) / 100,
        "action": np.zeros((steps, 2), np.float32),
    }
    if reward:
        arrays["reward"] = np.arange(steps, dtype=np.float32)
    if terminated is not None:
        arrays["terminated"] = terminated
    return Demonstrations(arrays, np.cumsum(lengths))


class Table(nn.Module):
    """Q of states and chunks that are their own numbers: two members, of which one says 1 more."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, observation, chunks, members=None):
        found = self.values[observation["observation"][:, 0, :1].long(), chunks[..., 0, 0].long()]
        return torch.stack([found, found + 1])


def test_backups_of_chunks_converge_to_the_values_of_a_chain():
    """States 0 to 3; chunk 0 goes two on in two steps, chunk 1 one on in one; the step out of state 3 alone
    is rewarded, and ends all."""
    gamma = 0.9
    model = make(gamma=gamma)
    rows = []
    for state in range(4):
        for chunk, length in ((0, 2), (1, 1)):
            executed = min(length, 4 - state)
            is_end = state + executed == 4
            rows.append((state, chunk, executed, gamma ** (executed - 1) * is_end, not is_end))
    state, chunk, executed, reward, goes_on = (
        torch.tensor(column).float() for column in zip(*rows, strict=True)
    )
    seen = {"observation": state[:, None, None].expand(-1, 1, 2)}
    after = {"observation": (state + executed).clamp(max=3)[:, None, None].expand(-1, 1, 2)}
    both = torch.tensor([0.0, 1.0])[None, :, None, None].expand(len(rows), 2, 4, 2)
    batch = Transitions(
        seen, chunk[:, None, None].expand(-1, 4, 2), executed, reward, goes_on * gamma**executed,
        goes_on < 1, goes_on < 0, after, {"chunks": both},
    )  # fmt: skip
    table = Table(torch.zeros(4, 2))
    model.actor_critic.extra["target"] = table
    model.learner.highest = 1.0
    for _ in range(5):
        table.values = model.learner.targets(batch).view(4, 2)
    steps_left = 4 - torch.arange(4.0)[:, None]
    torch.testing.assert_close(table.values, (gamma ** (steps_left - 1)).expand(4, 2))


def test_a_target_is_no_larger_than_rewards_allow_and_its_unit_may_change():
    model = make(gamma=0.9)
    model.learner.updates, model.learner.highest = 1, 2.0
    seen = {"observation": torch.zeros(3, 1, 2)}
    batch = Transitions(
        seen, torch.zeros(3, 4, 2), torch.full((3,), 4.0), torch.full((3,), 6.0),
        torch.tensor([0.6, 0.6, 0.0]), *torch.zeros(2, 3, dtype=torch.bool), seen,
        {"chunks": torch.zeros(3, 2, 4, 2)},
    )  # fmt: skip
    model.actor_critic.extra["target"] = Table(torch.full((1, 1), 1e6))
    assert model.learner.targets(batch).tolist() == [pytest.approx(20), pytest.approx(20), 6]
    chunks = torch.randn(3, 1, 4, 2)
    torch.nn.init.normal_(model.learner.critic.ensemble.layers[-1].weight)
    before = model.learner.critic(batch.observation, chunks).detach()
    model.learner.critics = model.learner.critics[:1]
    model.learner.observe((2.0, 0.0, 18.0, 3.0), [5.0])  # a standard deviation of 3
    torch.testing.assert_close(model.learner.critic(batch.observation, chunks) * 3, before)


def test_the_replay_keeps_what_follows_a_chunk():
    def known(observation, generator):
        return {"twice": 2 * observation["observation"][:, -1]}

    replay = ChunkReplay(
        5, Reach.observation_space, Reach.action_space, "cpu", 3, gamma=0.5, known=known,
        generator=torch.Generator().manual_seed(0), executed=lambda chunk: chunk.clamp(-1, 1),
    )  # fmt: skip

    def act(number, terminated, truncated):
        observation = {"observation": torch.full((3, 1, 2), float(number))}
        decision = SimpleNamespace(chunk=torch.full((3, 2, 2), 3.0), known=known(observation, None))
        step = ChunkStep(
            {}, {}, np.ones((3, 2), np.float32) * [[1, 2], [1, 0], [1, 2]], np.array([2, 1, 2]),
            np.array(terminated), np.array(truncated), np.zeros(3, bool), np.zeros(3, bool),
        )  # fmt: skip
        cut = {"observation": torch.full((sum(truncated), 1, 2), 0.5)} if any(truncated) else None
        replay.add(observation, decision, step, cut)

    act(10, [False, True, False], [False, False, True])
    assert replay.size() == 0  # nobody knows yet what follows
    act(20, [False] * 3, [False] * 3)
    found = replay._get_samples(range(3))
    assert found.reward.tolist() == [2, 1, 2]
    assert found.discount.tolist() == [0.25, 0, 0.25]
    assert found.next_observation["observation"][:, 0, 0].tolist() == [20, 10, 0.5]
    assert found.known["twice"][[0, 2], 0].tolist() == [40, 1]
    assert (found.chunk == 1).all()  # as executed
    replay.forget_waiting()  # the environments were reset
    act(30, [False] * 3, [False] * 3)
    act(40, [False] * 3, [False] * 3)
    assert replay.full
    kept = replay.state()["observation.observation"][:, 0, 0].tolist()
    assert kept == [10, 10, 30, 30, 30]  # the oldest made room


def test_chunks_in_a_row_make_one_target_until_the_episode_or_the_replay_ends():
    """Two environments; the first one's episode is terminated in its third chunk, and goes on in another."""
    replay = ChunkReplay(
        8, Reach.observation_space, Reach.action_space, "cpu", 2, gamma=0.5, known=lambda *_: {}, n_steps=3,
        generator=torch.Generator(), executed=lambda chunk: chunk,
    )  # fmt: skip
    for number in range(5):
        state = {"observation": torch.full((2, 1, 2), float(number))}
        is_end = np.array([number == 2, False])
        step = ChunkStep(
            {}, {}, np.full((2, 1), 1.0 + number, np.float32), np.array([1, 1]), is_end, is_end * False,
            np.zeros(2, bool), np.zeros(2, bool),
        )  # fmt: skip
        replay.add(state, SimpleNamespace(chunk=torch.zeros(2, 1, 2), known={}), step, None)
    found = replay._get_samples(range(8))
    after = found.next_observation["observation"][:, 0, 0]
    # Chunks 0 and 1, 2 and 3, ... are of one moment; the fifth of each environment is not followed yet.
    assert found.reward.tolist() == [1 + 1 + 0.75, 2.75, 2 + 1.5, 2 + 1.5 + 1, 3, 3 + 2, 4, 4]
    assert found.discount.tolist() == [0, 1 / 8, 0, 1 / 8, 0, 1 / 4, 1 / 2, 1 / 2]
    assert after[found.discount > 0].tolist() == [3, 4, 4, 4, 4]
    replay.rows["is_last"][:2] = True
    assert replay._get_samples([0]).reward.tolist() == [1]


def test_the_replay_knows_which_episodes_succeeded_once_they_are_over():
    """Of two environments, the first one's episodes have three chunks each and every second succeeds, in its
    second chunk; the other's has no end."""
    replay = ChunkReplay(
        20, Reach.observation_space, Reach.action_space, "cpu", 2, gamma=0.5, known=lambda *_: {},
        generator=torch.Generator(), executed=lambda chunk: chunk,
    )  # fmt: skip

    def marked():
        return [replay.rows["succeeded"][each : replay.size() : 2].int().tolist() for each in (0, 1)]

    def play(*chunks):
        for number in chunks:
            state = {"observation": torch.full((2, 1, 2), float(number))}
            ended = np.array([number % 3 == 2, False])
            step = ChunkStep(
                {}, {}, np.zeros((2, 1), np.float32), np.array([1, 1]), ended, ended * False,
                np.array([number % 6 == 1, number == 3]), np.zeros(2, bool),
            )  # fmt: skip
            replay.add(state, SimpleNamespace(chunk=torch.zeros(2, 1, 2), known={}), step, None)

    play(0, 1, 2)
    assert marked() == [[0, 0], [0, 0]]  # it is not over yet
    play(3)
    assert marked() == [[1, 1, 1], [0, 0, 0]]
    play(4, 5, 6)
    assert marked() == [[1, 1, 1, 0, 0, 0], [0] * 6]
    play(*range(7, 16))  # the replay has room for ten chunks of each
    assert replay.full
    assert marked() == [[0, 0, 1, 1, 1, 0, 1, 1, 1, 0], [0] * 10]  # chunks 10 to 14, and 5 to 9
    replay.forget_waiting()  # the environments were reset: nobody will know of the episode under way
    play(17, 18)
    assert not replay.rows["succeeded"][replay.pos - 2 : replay.pos].any()


@pytest.mark.parametrize("successes", [True, False])
def test_the_flow_imitates_all_that_was_done_or_what_succeeded(successes, monkeypatch):
    learner = EXPO(
        proposals=2, target_proposals=2, edit_hidden=(16,), flow_learning_rate=1e-3,
        imitates_successes=successes,
    )  # fmt: skip
    model = make(learner, demonstrations=recorded([9, 9]), learning_starts=16)
    model.learn(100)
    batch, policy, seen = model._batch(32), model.flow_policy, []
    assert batch.succeeded[16:].all()  # demonstrations
    batch.succeeded[:3] = True
    batch.succeeded[3:16] = False

    kind = type(policy.objective)
    whole = kind.loss

    def loss(self, network, imitated, *rest):
        seen.append(imitated)
        return whole(self, network, imitated, *rest)

    monkeypatch.setattr(kind, "loss", loss)
    arguments = model.learner.optimizers, model.generator, 0, True
    learner.improve(model.actor_critic, batch, *arguments)
    rows = batch.succeeded if successes else torch.ones(32, dtype=torch.bool)
    assert torch.equal(seen[0].action, batch.chunk[rows])
    assert torch.equal(seen[0].observation["observation"], batch.observation["observation"][rows])
    batch.succeeded[:] = False
    assert ("train/imitation_loss" in learner.improve(model.actor_critic, batch, *arguments)) != successes


@pytest.mark.parametrize("ends", [False, True])
def test_demonstrations_are_cut_where_what_follows_is_known(ends):
    terminated = np.zeros(13, bool)
    terminated[6] = ends
    policy = make_policy(obs_horizon=2, model=MLPConfig(hidden=16))
    cut = demonstrated(policy, recorded([7, 6], terminated if ends else None), 4, 0.5)
    newest = 100 * policy.observation_normalizers["observation"].denormalize(cut.observation["observation"])
    starts = [0, 1, 2, *([3, 4, 5, 6] if ends else []), 7, 8]
    assert newest[:, -1, 0].tolist() == pytest.approx(starts, abs=1e-4)
    executed = [4, 4, 4, *([4, 3, 2, 1] if ends else []), 4, 4]
    assert cut.executed.tolist() == executed
    assert cut.is_last.tolist() == [*([False] * 3 + [True] * 4 if ends else [True] * 3), True, True]
    assert (cut.discount == 0).tolist() == [3 <= start <= 6 for start in starts]
    discounted = [sum((s + i) * 0.5**i for i in range(n)) for s, n in zip(starts, executed, strict=True)]
    assert cut.reward.tolist() == pytest.approx(discounted)


def test_demonstrations_without_rewards_are_refused():
    with pytest.raises(DataError, match="no rewards"):
        make(demonstrations=recorded([9], reward=False)).learn(1)


@pytest.mark.parametrize("algorithm", LEARNERS, ids=NAMES)
def test_it_saves_loads_and_deploys_what_it_learnt(tmp_path, algorithm):
    env = make_vec_env(Reach, n_envs=4, seed=0)
    demos = recorded([9, 9])
    model = make(algorithm, env, demonstrations=demos)
    model.learn(150)
    model.save(tmp_path / "model")
    with pytest.raises(ConfigError, match="demonstrations"):
        OffPolicy.load(tmp_path / "model", env).learn(1, reset_num_timesteps=False)
    loaded = OffPolicy.load(tmp_path / "model", env, device="cpu", demonstrations=demos)
    assert loaded.algorithm == algorithm
    assert (loaded.num_timesteps, loaded.iteration, loaded.learner.updates) == (
        model.num_timesteps, model.iteration, model.learner.updates,
    )  # fmt: skip
    ours, theirs = model.learner.state()[0], loaded.learner.state()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = loaded.replay_buffer.state()
    assert all(torch.equal(rows[name], kept) for name, kept in model.replay_buffer.state().items())
    loaded.learn(1, reset_num_timesteps=False)
    observation = np.array([[0.2, -0.1]], np.float32)
    deployed = model.deployed_policy()
    torch.manual_seed(0)
    expected, _ = model.predict(observation, deterministic=True)
    torch.manual_seed(0)
    chunk = deployed.act(observation[:, None])
    np.testing.assert_allclose(np.clip(chunk[:, 0], -1, 1), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learns": {"name": "qchunk", "proposals": 5}}, "policy.steering"),
        ({"settings": {"members": 4}}, "policy.steering"),
        ({"settings": {"gamma": 3}}, "offpolicy.gamma"),
        ({"progress": 3}, "progress"),
        ({"algorithm": "ReinFlow"}, "reads OffPolicy"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_file_that_describes_no_model_is_one_sentence(tmp_path, changes, words):
    make().save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = json.dumps({**json.loads(members["config.json"]), **changes}).encode()
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=words) as caught:
        OffPolicy.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


class Stubborn(EXPO):
    """Acts by chunks that no flow proposes."""

    def act(self, networks, observation, generator):
        chunk, known = super().act(networks, observation, generator)
        return torch.full_like(chunk, 0.125), known


def test_the_flow_acts_as_pretrained_until_learning_starts():
    model = make(Stubborn(proposals=2, target_proposals=2, edit_hidden=(16,)), learning_starts=100)
    model.learn(200)
    replay = model.replay_buffer
    stubborn = (replay.rows["chunk"][: replay.size()] == 0.125).all(-1).all(-1)
    executed = replay.rows["executed"][: replay.size()]
    before = executed.cumsum(0) - executed < 100
    assert not stubborn[before].any()
    # What is executed is decided for an iteration, of four chunks in each of four environments.
    assert stubborn[executed.cumsum(0) > 100 + 16 * 4].all()
    assert not model.actor_critic.follows_flow


def test_it_learns():
    env = make_vec_env(Reach, n_envs=4, seed=0)
    learner = EXPO(proposals=8, target_proposals=1, edit_hidden=(16,), bound=0.5, edit_every=1)
    model = make(learner, env, gamma=0.1, learning_rate=3e-3, members=2, critic_hidden=(64,))
    before, _ = evaluate_policy(model, env, 12, warn=False)
    model.learn(700)
    after, _ = evaluate_policy(model, env, 12, warn=False)
    assert after > before + 1.5


class Mean(nn.Module):
    """The mean number of each chunk or x_0, times a factor that is learnt."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.seen = nn.Parameter(torch.tensor(factor)), []

    def forward(self, observation, chunks, members=None):
        self.seen.append(chunks)
        return self.factor * chunks.mean((2, 3))[None]


def test_dsrl_fits_its_latent_critic_on_pairs_that_belong_together():
    model = make(DSRL(proposals=4, fitted=3, actor_hidden=(16,)), learning_starts=16)
    model.learn(100)
    batch, networks = model._batch(8), model.actor_critic
    batch.known["chunks"] = batch.known["latents"] / 2
    latent = networks.extra["latent"] = Mean(0.5)
    networks.extra["target"] = Mean(1.0)
    optimizers = {**model.learner.optimizers, "latent": torch.optim.SGD(latent.parameters(), lr=1.0)}
    for _ in range(20):
        found = model.algorithm.improve(networks, batch, optimizers, model.generator, 1, True)
        assert found["train/latent_loss"] == pytest.approx(0, abs=1e-9)
    drawn = torch.cat(latent.seen, dim=1)
    assert drawn.shape[:2] == (8, 20 * 3)
    assert set(drawn[0].mean((1, 2)).tolist()) == set(batch.known["latents"][0].mean((1, 2)).tolist())


@pytest.mark.parametrize("kind", [EXPO, DSRL])
def test_the_temperature_starts_as_asked_and_follows_its_aim(kind):
    model = make(kind(proposals=2, temperature=0.3))
    temperature, optimizer = model.actor_critic.extra["temperature"], model.learner.optimizers["temperature"]
    assert temperature().item() == pytest.approx(0.3)
    temperature.step(optimizer, torch.tensor([-1.0]), 0.5)  # an entropy of 1 nat
    lower = temperature().item()
    assert lower < 0.3
    temperature.step(optimizer, torch.tensor([3.0]), 0.5)
    temperature.step(optimizer, torch.tensor([3.0]), 0.5)
    assert temperature().item() > lower


def test_settings_are_checked():
    assert set(NAMES) == set(ALGORITHMS)
    with pytest.raises(ConfigError, match=r"'offpolicy\.batchsize'; did you mean 'offpolicy\.batch_size'"):
        make(batchsize=3)
    with pytest.raises(ConfigError, match="no flow to integrate"):
        make(policy=make_policy(objective="regression"), num_steps=1)
    steered = make().deployed_policy()
    with pytest.raises(ConfigError, match="without steering"):
        make(policy=steered, algorithm=LEARNERS[1])


def test_sampled_edits_take_two_proposals():
    EXPO(proposals=2, samples_edits=True)
    with pytest.raises(
        ConfigError, match=r"algorithm\.proposals is 1; it must be 2 or more with samples_edits"
    ):
        EXPO(proposals=1, samples_edits=True)
