"""Depth maps."""

import numpy as np
import pytest
import torch
from kinds import check_kind, policy_of

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.features import Depth


@pytest.mark.parametrize("shape", [(40, 36), (40, 36, 1)])
def test_a_depth_map_is_a_whole_observation(shape, tmp_path):
    metres = np.random.default_rng(0).uniform(0, 4, (9, *shape))
    policy = check_kind(Depth(shape, nearest=0.2, farthest=3.0), metres, tmp_path)
    encoder = policy.network.encoder.cameras["thing"]
    assert encoder.window == (36, 32)
    assert next(encoder.backbone.parameters()).shape[1] == 1


@pytest.mark.parametrize("as_tensor", [False, True])
def test_integers_are_millimetres(as_tensor):
    policy = policy_of({"depth": Depth((40, 36))})
    millimetres = np.random.default_rng(0).integers(0, 9000, (2, 2, 40, 36), np.uint16)
    given = torch.from_numpy(millimetres.astype(np.int32)) if as_tensor else millimetres
    checked = policy.check_observations({"depth": given})["depth"]
    assert checked.dtype == torch.float32
    np.testing.assert_allclose(checked, millimetres / 1000, rtol=1e-6)


def test_distances_are_held_within_the_range():
    feature = Depth((1, 4), nearest=1.0, farthest=3.0)
    pixels = feature.pixels(torch.tensor([[0.0, 1.0, 2.0, 9.0]]))
    assert pixels.flatten().tolist() == [0.0, 0.0, 127.5, 255.0]


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
def test_what_no_sensor_means_is_refused(value):
    policy = policy_of({"depth": Depth((40, 36))})
    with pytest.raises(FlowPolicyError, match="'depth' holds"):
        policy.act({"depth": np.full((1, 2, 40, 36), value)})


@pytest.mark.parametrize(
    ("feature", "reason"),
    [
        (Depth((40, 36, 3)), "declared a depth map"),
        (Depth((40,)), "declared a depth map"),
        (
            Depth((40, 36), nearest=2.0, farthest=1.0),
            r"observations\.depth\.farthest is 1\.0; it must be above",
        ),
    ],
)
def test_what_is_no_depth_map_is_refused(feature, reason):
    with pytest.raises(ConfigError, match=reason):
        policy_of({"depth": feature})
