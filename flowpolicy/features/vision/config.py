"""Settings of the image encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from flowpolicy.ranges import Allowed, between, one_of, within
from flowpolicy.settings import Settings

BACKBONES = ("convnet", "resnet18", "vit")
Strength = Annotated[float, within("[0, 1]")]
_CHANNELS = Allowed(lambda count: 16 <= count <= 1024 and count % 16 == 0, "a multiple of 16, at most 1024")


@dataclass(frozen=True)
class VisionConfig(Settings, prefix="model.vision"):
    """How images become tokens; used only by policies with images.

    Attributes:
        backbone: ``convnet`` (small, the default), ``resnet18`` or ``vit``.
        crop: side of the crop as a share of the image's: random in training, central otherwise; 1 keeps
            the whole image.
        jitter: brightness, contrast and saturation are multiplied by numbers from 1 - strength to 1 +
            strength in training, drawn for each row and camera, one strength for each of the three; None
            leaves colours alone. Depth maps have none.
        channels: feature maps of the convnet; of the others they are fixed.
        keypoints: places given as coordinates besides the grid of features (spatial softmax, Finn et al.
            2016, "Deep spatial autoencoders"); 0 gives none.
    """

    backbone: Annotated[str, one_of(BACKBONES)] = "convnet"
    crop: Annotated[float, within("[0.5, 1]")] = 0.9
    jitter: tuple[Strength, Strength, Strength] | None = None
    channels: Annotated[int, _CHANNELS] = 64
    keypoints: Annotated[int, between(0, 1024)] = 32
