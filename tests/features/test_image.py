"""Images."""

import numpy as np
import pytest
from kinds import check_kind, policy_of

from flowpolicy.errors import ConfigError
from flowpolicy.features import Image


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_an_image_is_a_whole_observation(tmp_path):
    policy = check_kind(Image((40, 36, 3)), pixels(9, 40, 36, 3), tmp_path)
    assert not policy.observation_normalizers


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((3, 96, 96), r"'camera' is an image of shape \(3, 96, 96\), with its channels first; give it as "
                      r"\(96, 96, 3\)"),
        ((96, 96, 2), "declared an image; give height, width and 1, 3 or 4 channels"),
        ((96, 96), "declared an image"),
        ((4000, 40, 3), "at most 2048 pixels a side"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(shape, reason):
    with pytest.raises(ConfigError, match=reason):
        policy_of({"camera": Image(shape)})


def test_channels_are_brought_to_the_end():
    picture = pixels(2, 40, 36, 3)
    feature = Image((40, 36, 3))
    assert np.array_equal(feature.rearranged(np.moveaxis(picture, -1, -3)), picture)
    assert feature.rearranged(picture[:, :20]) is None
