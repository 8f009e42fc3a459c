import numpy as np
import pytest
import torch
from toy_training import toy_settings

from flowpolicy.data.store import Demonstrations
from flowpolicy.evaluation.task import Task
from flowpolicy.pretraining.run import PretrainConfig, make_policy
from flowpolicy.pretraining.stores import make_samplers
from flowpolicy.settings import build

TASK = Task("toy", "Pendulum-v1", obs_horizon=2, action_horizon=5)


def demos():
    """Commands lead the measured position a little, which drifts far."""
    rng = np.random.default_rng(0)
    position = np.cumsum(rng.normal(size=(60, 2)), 0).astype(np.float32)
    turn = np.linspace(-3, 9, 60, dtype=np.float32)[:, None]
    action = np.concatenate([position + 0.1 * rng.normal(size=(60, 2)), turn], 1).astype(np.float32)
    return Demonstrations({"position": position, "action": action}, np.array([20, 45, 60]))


@pytest.mark.parametrize(
    "data",
    [
        {"action_space": "relative", "action_state": ["position", None]},
        {"action_space": "delta", "action_state": ["position", None], "rotations": {"angle": [2]}},
        {"rotations": {"angle": [2]}},
    ],
)
def test_batches_are_what_a_policy_decodes_to_the_demonstrated_commands(data):
    settings = toy_settings()
    settings["data"] = {"observation_keys": ["position"], "validation_fraction": 0.0, **data}
    config, recorded = build(PretrainConfig, settings, ""), demos()
    policy = make_policy(config, TASK, recorded)
    assert policy.spec.metadata["lost_actions"] == 0
    training, _ = make_samplers(policy, recorded, config.data, 0)
    batch = training.batch(torch.arange(len(training)))
    learnt = batch.action[batch.mask]
    assert learnt.abs().max() == pytest.approx(1, abs=1e-4)  # fitted to what is learnt, all of it
    assert learnt.shape[1] == policy.spec.noise_shape[1]
    steps = torch.arange(60)
    index = torch.minimum(
        steps[:, None] + torch.arange(5), torch.tensor([19] * 20 + [44] * 25 + [59] * 15)[:, None]
    )
    wanted = torch.from_numpy(recorded.arrays["action"])[index]
    physical = {"position": torch.from_numpy(recorded.arrays["position"])[:, None].expand(-1, 2, -1)}
    decoded = policy.decode(policy.action_normalizer.denormalize(batch.action), physical)
    if "rotations" in data:
        decoded[..., 2], wanted[..., 2] = decoded[..., 2].cos(), wanted[..., 2].cos()
    assert torch.allclose(decoded[batch.mask], wanted[batch.mask], atol=1e-4)


def test_statistics_of_many_chunks_keep_the_extremes(monkeypatch):
    settings = toy_settings()
    data = {"action_space": "relative", "action_state": ["position", None], "validation_fraction": 0.0}
    settings["data"] = {"observation_keys": ["position"], **data}
    config, recorded = build(PretrainConfig, settings, ""), demos()
    whole = make_policy(config, TASK, recorded).action_normalizer
    monkeypatch.setattr("flowpolicy.pretraining.stores.MOST_ROWS", 10)
    sampled = make_policy(config, TASK, recorded).action_normalizer
    assert torch.allclose(sampled.scale, whole.scale)
    assert torch.allclose(sampled.center, whole.center)
