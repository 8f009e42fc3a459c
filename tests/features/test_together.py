"""A policy of every kind: in every backend, in the critic, and behind a server."""

import numpy as np
import pytest
import torch
from kinds import T_O, A, T, policy_of

from flowpolicy.acceleration.engine import random_observations
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.features import Depth, Image, Pose, Task, Vector
from flowpolicy.features.text import MOST_PIECES, Text
from flowpolicy.policy.observation_features import ObservationFeatures

FEATURES = {
    "front": Depth((40, 36), farthest=3.0),
    "tool": Pose((2, 4, 4)),
    "state": Vector((3,)),
    "camera": Image((40, 36, 3)),
    "task": Task((2,)),
    "base": Pose((7,)),
    "words": Text((MOST_PIECES,)),
}


@pytest.fixture
def policy():
    return policy_of(FEATURES)


@pytest.fixture
def observation(policy):
    return random_observations(policy, 3, torch.Generator().manual_seed(0))


def test_new_kinds_come_after_those_that_saved_policies_have(policy):
    encoder = policy.network.encoder
    assert list(encoder) == ["state", "task", "cameras", "pose", "text"]
    assert list(encoder.cameras) == ["front", "camera"]


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_a_sampler_computes_what_the_policy_does(policy, observation, backend):
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    noise = torch.randn(3, T, A)
    chunk = policy.act(observation, noise=noise)
    sampler = build_sampler(policy, batch_size=3, backend=backend)
    torch.testing.assert_close(sampler(observation, noise), chunk, rtol=0, atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_a_critic_reads_all_of_it(policy, observation, own):
    features = ObservationFeatures(policy.network, policy.spec.features, T_O, own)
    normalized = policy.normalize_observations(observation)
    seen = normalized if own else policy.network.encode_images(normalized)
    read = features(seen)
    assert read.shape == (3, features.size)
    for key, values in seen.items():
        assert not torch.equal(features({**seen, key: values.flip(0)}), read)


def test_a_server_takes_what_sensors_send(policy):
    pytest.importorskip("msgpack")
    from flowpolicy.serving.messages import decode, encode
    from flowpolicy.serving.service import PolicyService

    service = PolicyService(policy)
    request = {key: np.asarray(value) for key, value in policy.spec.resting_observation().items()}
    sent = {
        **request,
        "front": np.full((T_O, 40, 36), 1500, np.uint16),
        "camera": np.ascontiguousarray(np.moveaxis(request["camera"], -1, -3)),
    }
    read = service.read(encode(sent)).observations
    np.testing.assert_allclose(read["front"], 1.5)
    assert read["camera"].shape == (1, T_O, 40, 36, 3)
    assert decode(list(service.answer(encode(sent)))[-1])["actions"].shape == (T, A)
    assert service.metadata["observations"]["front"]["farthest"] == 3.0
