"""Images on their way through the loop and the server: uint8 from end to end, anything else refused."""

import numpy as np
import pytest
import torch

from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.control.events import EventLog
from flowpolicy.control.history import ObservationHistory
from flowpolicy.control.inference import Request
from flowpolicy.control.policy_inference import InferenceBuilder
from flowpolicy.errors import FlowPolicyError
from flowpolicy.features import features_of
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig

SHAPES = {"camera": (40, 40, 3), "state": (2,)}


@pytest.fixture
def policy():
    torch.manual_seed(0)
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    policy = FlowPolicy(PolicyConfig({"name": "flow_matching"}, model, SHAPES, 2, 2, 4, 4)).eval()
    policy.fit_normalizers({"state": torch.randn(9, 2)}, torch.randn(9, 2))
    return policy


def observation(seed=0):
    rng = np.random.default_rng(seed)
    return {"camera": rng.integers(0, 256, (40, 40, 3), np.uint8), "state": rng.normal(size=2)}


def test_a_history_keeps_images_as_they_are():
    history = ObservationHistory(features_of(SHAPES), 2, EventLog())
    history.add(observation(0), 0, 0.0)
    history.add(observation(1), 1, 0.1)
    newest = history.newest()
    assert newest["camera"].dtype == np.uint8
    assert np.array_equal(newest["camera"], [observation(0)["camera"], observation(1)["camera"]])


@pytest.mark.parametrize("spoil", [lambda image: image / 255.0, lambda image: image[:20], lambda image: "no"])
def test_an_image_of_another_kind_is_left_out_and_counted(spoil):
    events = EventLog()
    history = ObservationHistory(features_of(SHAPES), 2, events)
    history.add(observation(0), 0, 0.0)
    before = history.newest()
    bad = observation(1)
    history.add({**bad, "camera": spoil(bad["camera"])}, 1, 0.1)
    assert events.content()["counts"] == {"observation invalid": 1}
    assert all(np.array_equal(before[key], value) for key, value in history.newest().items())


def test_the_server_plans_what_the_loop_plans(policy, tmp_path):
    pytest.importorskip("msgpack")
    from flowpolicy.serving.messages import decode, encode
    from flowpolicy.serving.service import PolicyService

    checkpoint = policy.save(tmp_path / "checkpoint")
    history = ObservationHistory(features_of(SHAPES), 2, EventLog())
    for seed in range(2):
        history.add(observation(seed), seed, 0.0)
    sampler = InferenceBuilder(DeployedSampler(checkpoint=str(checkpoint), backend="eager"))()
    state = sampler.generator.get_state()
    sampled = sampler(Request(0, history.newest()))
    sampler.generator.set_state(state)
    noise = torch.randn(1, 4, 2, generator=sampler.generator).numpy()
    service = PolicyService(policy)
    answers = list(service.answer(encode({**history.newest(), "noise": noise[0]})))
    np.testing.assert_allclose(decode(answers[-1])["actions"], sampled, atol=1e-5)
    with pytest.raises(FlowPolicyError, match="'camera' is an image of float64; give uint8"):
        list(service.answer(encode({**history.newest(), "camera": history.newest()["camera"] / 255})))
