"""Images at another size show the same."""

from __future__ import annotations

import numpy as np
import pytest

from flowpolicy.features.resizing import resize_images


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_halves_are_averages_and_the_rest_of_the_shape_stays(channels: int):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 1, 1, channels), np.uint8)
    images = np.repeat(np.repeat(images, 8, axis=2), 12, axis=3)
    resized = resize_images(images, (4, 6))
    assert resized.shape == (2, 3, 4, 6, channels)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, images[:, :, :4, :6])


def test_nothing_is_lost_between_pixels():
    """Lines of one pixel, which picking every fourth would miss or take for all there is."""
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, ::4] = 200
    resized = resize_images(image, (16, 16))
    assert np.abs(resized[:, 2:-2].astype(float) - 50).max() < 12
    assert resize_images(image, (64, 64)) is image
