"""A kind from outside the package is one class: its policy is trained, saved, served and fine-tuned."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from kinds import A, T, check_kind, policy_of

from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.features import FEATURE_KINDS, Feature, Vector
from flowpolicy.plugins import register
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.observation_features import ObservationFeatures
from flowpolicy.settings import build


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class Angle(Feature):
    """Angles in radians, or in degrees, of which a network reads sine and cosine."""

    degrees: bool = False
    name: ClassVar[str] = "angle"

    def problem(self, values):
        turns = "holds angles beyond a thousand turns; is the encoder broken?"
        return super().problem(values) or (turns if abs(values).max() > 1e6 else "")

    def normalized(self):
        return np.zeros(self.shape, bool)  # an angle has a range of its own

    @property
    def size(self):
        return 2 * super().size

    def numbers(self, values):
        angle = super().numbers(values) * (torch.pi / 180 if self.degrees else 1)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


def test_it_is_a_whole_observation(tmp_path):
    data = np.random.default_rng(0).uniform(-3, 3, (9, 2))
    policy = check_kind(Angle((2,)), data, tmp_path)
    with pytest.raises(FlowPolicyError, match="'thing' holds angles beyond a thousand turns"):
        policy.act({"thing": np.full((1, 2, 2), 1e7)})
    turned = data[None, :2] + 2 * np.pi
    noise = torch.randn(1, T, A)
    chunks = [policy.act({"thing": value}, noise=noise) for value in (data[None, :2], turned)]
    torch.testing.assert_close(*chunks, atol=1e-4, rtol=0)
    features = ObservationFeatures(policy.network, policy.spec.features, 2)
    assert features(policy.normalize_observations({"thing": turned})).shape == (1, features.size) == (1, 8)


@pytest.mark.parametrize("declared_by", ["store", "settings"])
def test_it_is_trained_by_declaring_it(tmp_path, declared_by):
    pytest.importorskip("hydra")
    from flowpolicy.evaluation.task import Task
    from flowpolicy.pretraining.run import (
        PretrainConfig,
        find_demonstrations,
        make_policy,
        make_samplers,
    )

    rng = np.random.default_rng(0)
    arrays = {"joint": rng.uniform(-180, 180, (20, 2)), "action": rng.normal(size=(20, A))}
    kinds = {"joint": {"kind": "angle", "degrees": True}}
    attributes = {"kinds": kinds} if declared_by == "store" else {}
    demos = Demonstrations(arrays, np.array([12, 20]), attributes)
    store = write_demonstrations(tmp_path / "a.zarr", demos)
    task = Task(name="toy", env_id="Toy-v0", obs_horizon=2, action_horizon=T, execute_horizon=2)
    settings = {
        "env": {}, "policy": {"name": "flow_matching"},
        "model": {"width": 16, "depth": 1, "num_heads": 2},
        "data": {"path": str(store), "observation_keys": ["joint"], "kinds": None if attributes else kinds},
        "train": {},
    }  # fmt: skip
    config = build(PretrainConfig, settings, "")
    demos = find_demonstrations(config, task)
    policy = make_policy(config, task, demos)
    assert policy.spec.features == {"joint": Angle((2,), degrees=True)}
    sampler, _ = make_samplers(policy, demos, config.data, seed=0)
    optimizer = torch.optim.Adam(policy.network.parameters(), 3e-3)
    batch, losses = sampler.batch(torch.arange(len(sampler))), []
    draws = policy.objective.draw(tuple(batch.action.shape), torch.Generator().manual_seed(0), "cpu")
    for _ in range(30):
        loss, _ = policy.objective.loss(policy.network, batch, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    loaded = FlowPolicy.load(policy.save(tmp_path / "checkpoint"))
    assert loaded.spec.features == policy.spec.features


class Doubled(torch.nn.Module):
    """One token a step: twice the value."""

    def __init__(self, key, width):
        super().__init__()
        self.key, self.width = key, width

    def forward(self, observation):
        return 2 * observation[self.key][..., :1].expand(-1, -1, self.width)


@dataclass(frozen=True)
class Force(Vector):
    """A vector with an encoder of its own."""

    name: ClassVar[str] = "force"

    @classmethod
    def encoder(cls, features, obs_horizon, sizes):
        return Doubled(*features, sizes.width)


@dataclass(frozen=True)
class Torque(Force):
    """Another one, beside the vectors."""

    name: ClassVar[str] = "torque"
    encoder_name: ClassVar[str] = "torque"


def test_a_kind_of_vectors_may_have_an_encoder_of_its_own():
    assert isinstance(policy_of({"arm": Force((1,))}).network.encoder["state"], Doubled)
    policy = policy_of({"arm": Vector((3,)), "hand": Torque((1,))})
    assert isinstance(policy.network.encoder["torque"], Doubled)
    observation = {"arm": torch.zeros(1, 2, 3), "hand": torch.zeros(1, 2, 1)}
    assert torch.isfinite(policy.act(observation)).all()
    with pytest.raises(ConfigError, match=r"arm, hand share the encoder 'state'.*vector, force"):
        policy_of({"arm": Vector((3,)), "hand": Force((1,))})
