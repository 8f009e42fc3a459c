import pytest
import torch

from flowpolicy.errors import ConfigError
from flowpolicy.features import Depth, Image
from flowpolicy.features.cameras import CameraEncoders
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.features.vision.encoder import ImageEncoder
from flowpolicy.features.vision.jitter import jittered

IMAGES = torch.randint(256, (3, 2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_brightness_contrast_and_saturation_are_the_factors_that_were_drawn():
    torch.manual_seed(3)
    factors = 1 + 0.2 * (2 * torch.rand(3, 3) - 1)
    for number in range(3):
        strengths = [0.2 if place == number else 0.0 for place in range(3)]
        torch.manual_seed(3)
        result = jittered(IMAGES[:, :1], strengths)
        for row, image in enumerate(IMAGES[:, 0].float()):
            grey = (image * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
            centre = (torch.zeros(1), grey.mean(), grey)[number]
            wanted = (centre + factors[number, row] * (image - centre)).clamp(0, 255)
            assert torch.allclose(result[row, 0], wanted, atol=1e-3)


def test_a_history_has_one_colour_and_rows_have_different_ones():
    same = IMAGES[:1, :1].expand(3, 2, -1, -1, -1)
    result = jittered(same, (0.3, 0.4, 0.5))
    assert torch.equal(result[:, 0], result[:, 1])
    assert not torch.equal(result[0], result[1])
    assert result.min() >= 0
    assert result.max() <= 255


@pytest.mark.parametrize("channels", [1, 4])
def test_what_is_no_colour_stays(channels):
    images = torch.full((2, 1, 4, 4, channels), 100.0)
    result = jittered(images, (0.0, 0.5, 0.5))
    assert torch.allclose(result, images, atol=1e-3)  # grey of one value
    dark = jittered(images, (1.0, 0.0, 0.0))
    assert channels == 1 or torch.equal(dark[..., 3], images[..., 3])


def test_an_encoder_jitters_in_training_alone_and_leaves_depth():
    config = VisionConfig(crop=1.0, jitter=(0.3, 0.4, 0.5))
    encoder = ImageEncoder((32, 32, 3), 1, 16, config)
    images = torch.randint(256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))
    cameras = CameraEncoders({"rgb": Image((32, 32, 3)), "front": Depth((32, 32))}, 1, 16, config)
    assert (cameras["rgb"].jitter, cameras["front"].jitter) == ((0.3, 0.4, 0.5), None)
    with pytest.raises(ConfigError, match="jitter"):
        VisionConfig(jitter=(0.3, 0.4, 1.5))
