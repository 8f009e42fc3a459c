import dataclasses

import numpy as np
import pytest
import torch

from flowpolicy import CheckpointError, ConfigError, FlowPolicy
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.features import Image, Vector
from flowpolicy.finetuning.chain import NoisyFlow
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.models.config import MLPConfig, TransformerConfig
from flowpolicy.policy import PolicyConfig
from flowpolicy.policy.action_space import ActionConfig, action_config
from flowpolicy.policy.rotations import encoded

FEATURES = {"arm": Vector((3,)), "hand": Vector(()), "camera": Image((32, 32, 3))}
STATE = (("arm", 2), ("arm", 0), None, ("hand", 0))
WAYS = {
    "relative": ActionConfig("relative", STATE),
    "delta": ActionConfig("delta", STATE),
    "rotations": ActionConfig("absolute", (), {"rotation_vector": (1,)}),
    "both": ActionConfig("delta", (("hand", 0), None, None, None), {"rotation_vector": (1,)}),
}
ROWS, T, A = 3, 4, 4


def policy_of(actions, *, model=None, **changes):
    model = model or TransformerConfig(width=16, depth=1, num_heads=2, tokens_per_step=1)
    features = {"arm": Vector((3,)), "hand": Vector(())}
    config = PolicyConfig(
        {"name": "flow_matching"}, model, features, A, 2, T, 2, actions=actions, action_clip=1.0, **changes
    )
    torch.manual_seed(0)
    policy = FlowPolicy(config)
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    inner = policy.action_space.inner_dim
    observation = {"arm": torch.randn(50, 3), "hand": torch.randn(50)}
    policy.fit_normalizers(observation, torch.randn(50, inner) * torch.linspace(0.5, 2, inner))
    return policy.eval()


def observed():
    generator = torch.Generator().manual_seed(1)
    return {
        key: 5 * torch.randn(ROWS, 2, *FEATURES[key].shape, generator=generator) for key in ("arm", "hand")
    }


def noise_of(policy):
    return torch.randn(ROWS, *policy.spec.noise_shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_learnt_of_commands_gives_them_back(way):
    policy = policy_of(WAYS[way])
    commands = torch.randn(ROWS, T, A)
    observation = policy.check_observations(observed())
    newest = {key: values[:, -1] for key, values in observation.items()}
    inner = policy.action_space.encode(commands, policy.action_space.base(newest))
    assert inner.shape == (ROWS, *policy.spec.noise_shape)
    assert torch.allclose(policy.decode(inner, observation), commands, atol=1e-5)
    arm, hand = observation["arm"][:, -1], observation["hand"][:, -1]
    if way == "relative":
        assert torch.equal(inner[:, 2, 0], commands[:, 2, 0] - arm[:, 2])
        assert torch.equal(inner[:, 2, 3], commands[:, 2, 3] - hand)
        assert torch.equal(inner[..., 2], commands[..., 2])
    if way == "delta":
        assert torch.equal(inner[:, 0, 1], commands[:, 0, 1] - arm[:, 0])
        assert torch.equal(inner[:, 2, 1], commands[:, 2, 1] - commands[:, 1, 1])
    if way == "both":
        assert torch.allclose(inner[..., 1:], encoded(commands[..., 1:], "rotation_vector"))


@pytest.mark.parametrize("way", WAYS)
def test_a_policy_gives_commands_that_move_with_the_state(way, tmp_path):
    policy = policy_of(WAYS[way])
    noise, observation = noise_of(policy), observed()
    chunk = policy.act(observation, noise=noise)
    assert chunk.shape == (ROWS, T, A)
    if way in ("relative", "delta"):  # beyond what its normalisers tell apart
        far = {key: values + 1000 for key, values in observation.items()}
        farther = {key: values + 2000 for key, values in observation.items()}
        moved = policy.act(farther, noise=noise) - policy.act(far, noise=noise)
        assert torch.allclose(moved, torch.tensor([1000.0, 1000, 0, 1000]).expand_as(moved), atol=1e-2)
    policy.save(tmp_path / "checkpoint")
    loaded = FlowPolicy.load(tmp_path / "checkpoint")
    assert loaded.config.actions == WAYS[way]
    assert torch.equal(loaded.act(observation, noise=noise), chunk)
    assert loaded.spec.action_dim == A


@pytest.mark.parametrize(
    ("way", "backend"),
    [*((way, "eager") for way in WAYS), pytest.param("both", "onnx", marks=pytest.mark.slow)],
)
def test_samplers_give_the_same_commands(way, backend):
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    policy = policy_of(WAYS[way])
    sampler = build_sampler(policy, batch_size=2, backend=backend, num_steps=2)
    noise, observation = noise_of(policy), observed()
    wanted = policy.act(observation, noise=noise, num_steps=2)
    assert torch.allclose(sampler.act(observation, noise=noise), wanted, atol=1e-4)


def test_a_network_of_ones_own_sees_what_is_learnt():
    policy = policy_of(WAYS["both"], model=MLPConfig(width=16, hidden=32))
    assert policy.act(observed(), noise=noise_of(policy)).shape == (ROWS, T, A)
    assert policy.network.output.out_features == T * 7


@pytest.mark.parametrize("way", WAYS)
def test_a_prefix_of_commands_leads_the_chunk(way):
    policy = policy_of(WAYS[way])
    noise, observation = noise_of(policy), observed()
    free = policy.act(observation, noise=noise, num_steps=4)
    other = policy.act(observation, noise=noise.flip(0), num_steps=4)
    guided = build_sampler(
        policy, batch_size=ROWS, num_steps=4, guidance={"name": "prefix", "prior_std": 0.3}
    )
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(ROWS, T)
    chunk = guided.act(observation, noise=noise, prefix=(other, weights))
    checked = policy.check_observations(observation)
    inner = [policy.encode(each, checked)[:, :2] for each in (chunk, free, other)]
    before, after = ((each - inner[2]).square().mean() for each in (inner[1], inner[0]))
    assert after < 0.6 * before


def test_settings_name_the_state_by_key_entry_or_number():
    kinds = {"arm": Vector((3,)), "hand": Vector(())}
    named = action_config("delta", ["arm[2]", "arm[0]", None, "hand"], None, kinds, 4)
    assert named == ActionConfig("delta", STATE)
    assert action_config("relative", "arm", None, FEATURES, 3).state == tuple(("arm", i) for i in range(3))
    assert action_config("relative", [1, None], None, {"arm": Vector((3,))}, 2).state == (("arm", 1), None)
    assert action_config(None, None, None, kinds, 4) == ActionConfig()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("relative", None, None), "data.action_space=relative subtracts a state"),
        (("absolute", "arm", None), "null where data.action_space is absolute"),
        (("relative", "leg", None), "'leg', which is no observation"),
        (("relative", "arm", None), "one entry for each of the 4 dimensions"),
        (("relative", [None] * 4, None), "not all of them null"),
        (("relative", ["arm[7]", None, None, None], None), "an entry of"),
        (("relative", ["camera[7]", None, None, None], None), "no pixel"),
        (("relative", [1, None, None, None], None), "a key with its entry"),
        ((None, None, {"quaternion": [1]}), "within the 4 dimensions|within 4 dimensions"),
        ((None, None, {"rotation_vector": [0], "angle": [2]}), "apart from others"),
        ((None, None, {"spin": [0]}), "actions.rotations is 'spin'"),
        (
            ("relative", ["hand", None, "hand", None], {"rotation_vector": [1]}),
            "null where a dimension is a rot",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        action_config(*given, FEATURES, 4)


def test_a_checkpoint_says_nothing_of_plain_actions_and_nonsense_is_refused(tmp_path):
    plain = policy_of(ActionConfig())
    assert "actions" not in plain.config.content()
    policy_of(WAYS["relative"]).save(tmp_path / "c")
    file = tmp_path / "c" / "config.json"
    file.write_text(file.read_text().replace('"relative"', '"sideways"'))
    with pytest.raises(CheckpointError, match="sideways"):
        FlowPolicy.load(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"actions\.state"):
        dataclasses.replace(plain.config, actions=ActionConfig("absolute", STATE))


def test_fine_tuning_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"Fine-tuning takes policies .* learns relative actions"):
        NoisyFlow(policy_of(WAYS["relative"]), 2, NoiseConfig())


def test_commands_that_are_learnt_as_they_are_cost_nothing():
    policy = policy_of(ActionConfig())
    actions = torch.randn(ROWS, T, A)
    assert policy.decode(actions, {}) is actions
    assert np.prod(policy.spec.noise_shape) == T * A
