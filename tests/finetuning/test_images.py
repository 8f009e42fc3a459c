"""Fine-tuning from images: what is frozen stays, what is trained moves, and the likelihood stays exact."""

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from stable_baselines3.common.env_util import make_vec_env

from flowpolicy.data.sampling import Batch
from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.task import Task
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.finetuning.advantages import GAE
from flowpolicy.finetuning.chain import log_prob
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig

SIDE = 32


class ReachSeen(gym.Env):
    """Reward is highest where the action points at a bright square, which only the image shows."""

    observation_space = gym.spaces.Dict(
        {
            "camera": gym.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8),
            "state": gym.spaces.Box(-1, 1, (1,), np.float32),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target, self.steps = self.np_random.uniform(-0.7, 0.7, 2), 0
        row, column = ((self.target + 1) / 2 * (SIDE - 8)).astype(int)
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        image[row : row + 8, column : column + 8] = 255
        self.image = image
        return self.seen(), {}

    def seen(self):
        return {"camera": self.image.copy(), "state": np.zeros(1, np.float32)}

    def step(self, action):
        self.steps += 1
        reward = 1.0 - float(np.abs(action - self.target).mean())
        return self.seen(), reward, False, self.steps == 4, {}


gym.register("ReachSeen-v0", entry_point=ReachSeen)


def make(**settings):
    torch.manual_seed(0)
    vision = VisionConfig(channels=16, crop=1.0, keypoints=8)
    model = TransformerConfig(width=16, depth=1, num_heads=2, vision=vision)
    shapes = {"camera": (SIDE, SIDE, 3), "state": (1,)}
    policy = FlowPolicy(PolicyConfig({"name": "flow_matching"}, model, shapes, 2, 1, 2, 2)).eval()
    for parameter in policy.network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    defaults = {"num_steps": 2, "n_steps": 16, "batch_size": 64, "n_epochs": 2, "critic_warmup": 0, "seed": 0}
    return ReinFlow(policy, make_vec_env("ReachSeen-v0", n_envs=8, seed=0), **{**defaults, **settings})


def moved(module, before):
    return [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("image_encoder", ["frozen", "trained"])
@pytest.mark.parametrize("critic_encoder", ["shared", "own"])
def test_what_learns_is_what_was_asked_for(image_encoder, critic_encoder):
    model = make(image_encoder=image_encoder, critic_encoder=critic_encoder)
    cameras, critic = model.actor_critic.flow_policy.network.encoder.cameras, model.actor_critic.critic
    before = {name: value.clone() for name, value in cameras.state_dict().items()}
    own = {name: value.clone() for name, value in critic.features.cameras.state_dict().items()}
    model.learn(2 * 16 * 8 * 2)
    assert bool(moved(cameras, before)) == (image_encoder == "trained")
    assert bool(own) == (critic_encoder == "own")
    assert bool(moved(critic.features.cameras, own)) == (critic_encoder == "own")
    stored = model.rollout_buffer.observations()["camera"]
    is_encoded_once = image_encoder == "frozen" and critic_encoder == "shared"
    assert (stored.ndim == 3) == is_encoded_once
    assert stored.dtype == (torch.float32 if is_encoded_once else torch.uint8)


@pytest.mark.parametrize("image_encoder", ["frozen", "trained"])
def test_the_likelihood_of_a_chain_is_that_it_was_sampled_with(image_encoder):
    model = make(image_encoder=image_encoder)
    env_steps = 16 * 8 * 2
    model.train = lambda: None
    model.learn(env_steps)
    data = model.rollout_buffer.data(
        model.actor_critic.values, model.collector.after, model.scale, GAE(0.99, 0.95)
    )
    with torch.no_grad():
        mean, std = model.actor_critic.flow(data.observation, data.x)
    scored, sampled = log_prob(data.x, mean, std), log_prob(data.x, data.mean, data.std)
    torch.testing.assert_close(scored.sum((1, 2, 3)), sampled.sum((1, 2, 3)), rtol=0, atol=1e-4)


def demonstrate(policy, steps=150, rows=32):
    """Pretrain on the shown target, aimed at badly."""
    env, generator = ReachSeen(), torch.Generator().manual_seed(0)
    shown = [(env.reset(seed=seed)[0]["camera"], env.target) for seed in range(400)]
    images, targets = (torch.as_tensor(np.array(part)) for part in zip(*shown, strict=True))
    optimizer = torch.optim.Adam(policy.network.parameters(), lr=3e-3)
    for _ in range(steps):
        index = torch.randint(400, (rows,), generator=generator)
        miss = 0.4 * torch.randn(rows, 2, 2, generator=generator)
        action = (targets[index, None].float() + miss).clamp(-1, 1)
        observation = {"camera": images[index, None], "state": torch.zeros(rows, 1, 1)}
        batch = Batch(observation, action, torch.ones(rows, 2, dtype=torch.bool))
        draws = policy.objective.draw((rows, 2, 2), generator, "cpu")
        loss, _ = policy.objective.loss(policy.network, batch, draws, policy.network)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()


def test_finetuning_aims_better_at_what_only_the_image_shows(tmp_path):
    task = Task("seen", "ReachSeen-v0", action_horizon=2, execute_horizon=2)
    model = make(image_encoder="trained", n_steps=32, batch_size=128, n_epochs=3, learning_rate=1.5e-3)
    demonstrate(model.actor_critic.flow_policy)

    def score(policy):
        return evaluate(policy, task, episodes=40, num_steps=2, show_progress=False).returns

    before = score(model.deployed_policy())
    model.learn(4 * 32 * 8 * 2)
    after = score(model.deployed_policy())
    gain = after - before
    blind = 4 * (1 - 0.35)  # the best that a constant action can do, in four steps
    assert after.mean() > blind + 0.5
    assert gain.mean() > 3 * gain.std() / np.sqrt(40)
    model.save(tmp_path / "model")
    loaded = ReinFlow.load(tmp_path / "model")
    observation = ReachSeen().reset(seed=1)[0]
    history = {key: value[None, None] for key, value in observation.items()}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    chunks = [
        each.actor_critic.sample_chunks(history, deterministic=True, generator=generator)
        for each, generator in zip((model, loaded), generators, strict=True)
    ]
    np.testing.assert_allclose(chunks[0], chunks[1], atol=1e-6)
    action, _ = loaded.predict(observation, deterministic=True)
    assert loaded.action_space.contains(action)
