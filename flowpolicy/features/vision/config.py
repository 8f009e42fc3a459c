"""Settings of the image encoders."""

from __future__ import annotations

from dataclasses import dataclass

from flowpolicy.settings import require

BACKBONES = ("convnet", "resnet18", "vit")


@dataclass(frozen=True)
class VisionConfig:
    """How images become tokens; used only by policies with images.

    Attributes:
        backbone: ``convnet`` (small, the default), ``resnet18`` or ``vit``.
        crop: side of the crop as a share of the image's: random in training, central otherwise; 1 keeps
            the whole image.
        channels: feature maps of the convnet; of the others they are fixed.
        keypoints: places given as coordinates besides the grid of features (spatial softmax, Finn et al.
            2016, "Deep spatial autoencoders"); 0 gives none.
    """

    backbone: str = "convnet"
    crop: float = 0.9
    channels: int = 64
    keypoints: int = 32

    def __post_init__(self) -> None:
        require(
            self.backbone in BACKBONES,
            "model.vision.backbone",
            self.backbone,
            f"one of {', '.join(BACKBONES)}",
        )
        require(0.5 <= self.crop <= 1.0, "model.vision.crop", self.crop, "in [0.5, 1]")
        is_grouped = 16 <= self.channels <= 1024 and self.channels % 16 == 0
        require(is_grouped, "model.vision.channels", self.channels, "a multiple of 16, at most 1024")
        require(0 <= self.keypoints <= 1024, "model.vision.keypoints", self.keypoints, "between 0 and 1024")
