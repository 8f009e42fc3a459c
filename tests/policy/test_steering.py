"""A steering around a flow: what it chooses, and that it is loaded and sampled as part of the policy."""

import dataclasses

import pytest
import torch

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import PolicyConfig
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.policy.steering import BoundedGaussian, ChunkCritic

STEERINGS = {
    "best_of": {"proposals": 3, "members": 2, "hidden": [8]},
    "edited": {"proposals": 2, "members": 2, "hidden": [8], "edit_hidden": [8], "bound": 0.2},
    "latent": {"hidden": [8]},
}


def steered(name):
    torch.manual_seed(0)
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    config = PolicyConfig(
        {"name": "flow_matching"}, model, {"observation": (2,)}, 2, 1, 4, 3,
        steering=None if name is None else {"name": name, **STEERINGS[name]},
    )  # fmt: skip
    policy = FlowPolicy(config).eval()
    for parameter in policy.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return policy


@pytest.mark.parametrize("name", STEERINGS)
def test_it_is_saved_and_sampled_with_the_policy(tmp_path, name):
    policy = steered(name)
    draws = {"best_of": 3, "edited": 2, "latent": 1}[name]
    assert policy.spec.noise_shape == (4, 2 * draws)
    assert policy.nfe() == 4 * draws
    observation, noise = torch.randn(5, 1, 2), policy.noise(5, None, None)
    chunk = policy.act(observation, noise=noise)
    loaded = FlowPolicy.load(policy.save(tmp_path / "policy"))
    assert torch.equal(loaded.act(observation, noise=noise), chunk)
    assert fingerprint(loaded) == fingerprint(policy)
    torch.testing.assert_close(build_sampler(loaded, batch_size=2).act(observation, noise=noise), chunk)
    for settings in ({"dtype": "bfloat16"}, {"backend": "onnx"}, {"guidance": {"name": "prefix"}}):
        with pytest.raises(ConfigError, match="without steering"):
            build_sampler(loaded, **settings)


def test_the_best_chunk_is_the_one_that_the_critic_says():
    policy = steered("best_of")
    observation = {"observation": torch.randn(6, 1, 2)}
    noise = policy.noise(6, None, None)
    each = noise.view(6, 4, 3, 2).transpose(1, 2)
    chunks = policy.proposals(observation, each, policy.sampling)
    for row in range(6):  # the flow of one x_0 by itself
        seen = {"observation": observation["observation"][row : row + 1]}
        alone = policy.proposals(seen, each[row, None, 1:2], policy.sampling)
        torch.testing.assert_close(alone[0, 0], chunks[row, 1])
    values = policy.steering.critic(observation, chunks).mean(0)
    expected = chunks[torch.arange(6), values.argmax(1)]
    torch.testing.assert_close(policy.sample(observation, noise, policy.sampling), expected)


def test_edits_are_bounded_and_of_what_is_executed_alone():
    policy = steered("edited")
    chunks = torch.randn(5, 2, 4, 2).clamp(-1, 1)
    seen = {"observation": torch.randn(5, 1, 2)}
    edits, _ = policy.steering.edits.sample(policy.steering.inputs(seen, chunks), None)
    edited = policy.steering.edited(chunks, edits)
    assert (edited - chunks).abs().max() <= 0.2 + 1e-6
    assert torch.equal(edited[:, :, 3:], chunks[:, :, 3:])  # T_e = 3


def test_sampled_edits_follow_from_x0_and_have_the_density_of_the_edit_policy():
    policy = steered("edited")
    edited, seen = policy.steering, {"observation": torch.randn(1, 1, 2).expand(4000, 1, 2)}
    noise, chosen = torch.randn(4000, 2, 4, 2), {}
    edited.best = lambda observation, chunks: chosen.update(all=chunks) or chunks[:, 0]
    flow = lambda x: torch.zeros_like(x)  # noqa: E731
    edited.chunk(seen, noise, flow)
    assert torch.equal(*chosen["all"][:2, 2:])  # without noise they are all the same
    edited.samples_edits = True
    edited.chunk(seen, noise, flow)
    first = chosen["all"]
    edited.chunk(seen, noise, flow)
    assert torch.equal(chosen["all"], first)
    inputs = edited.inputs(seen, first[:, :2])
    mean, log_std = edited.edits.moments(inputs)
    found = torch.atanh(first[:, 2:, :3] / 0.2)  # T_e = 3, whose bound is 0.2
    whitened = (found - mean) / log_std.exp()
    assert whitened.mean((0, 1)).abs().max() < 0.05
    torch.testing.assert_close(whitened.std((0, 1)), torch.ones(3, 2), atol=0.05, rtol=0)
    assert torch.equal(first[:, :2], torch.zeros_like(first[:, :2]))
    assert (whitened * noise[:, :, :3]).mean((0, 1)).abs().max() < 0.05  # nothing of the chunk's own x_0


def test_the_density_of_a_bounded_gaussian_integrates_to_one():
    torch.manual_seed(0)
    actor = BoundedGaussian(1, (1,), (4,), 0.5, -0.5)
    torch.nn.init.normal_(actor.layers[-1].weight)
    x = torch.zeros(200_000, 1)
    sample, log_prob = actor.sample(x, None)
    # The mean of 1 / p over samples of p is the length of the interval, 2 in units of the bound.
    inside = (sample[:, 0].abs() < 0.45).float()
    assert float((inside / log_prob.detach().exp()).mean()) == pytest.approx(1.8, abs=0.02)


def test_the_critic_sees_the_executed_part_of_a_chunk():
    policy = steered("best_of")
    critic = policy.steering.critic
    assert isinstance(critic, ChunkCritic)
    chunks = torch.randn(1, 2, 4, 2)
    chunks[:, 1, :3] = chunks[:, 0, :3]
    values = critic({"observation": torch.randn(1, 1, 2)}, chunks)
    torch.testing.assert_close(values[..., 0], values[..., 1])


def test_what_is_no_steering_is_refused(tmp_path):
    config = steered(None).config
    for wrong, words in (
        ({"name": "best"}, "steering.name"),
        ({"name": "best_of", "proposals": 0}, "steering.proposals"),
        ({"name": "best_of", "bound": 1.0}, "steering.bound"),
    ):
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(config, steering=wrong)
    steered("best_of").save(tmp_path / "policy")
    steered(None).save(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").replace(tmp_path / "policy" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"steering\."):
        FlowPolicy.load(tmp_path / "policy")
