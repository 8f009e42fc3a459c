"""Settings of the image encoders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from flowpolicy.ranges import Allowed, between, within
from flowpolicy.settings import Settings, require

BACKBONES = ("convnet", "resnet18", "vit")
Strength = Annotated[float, within("[0, 1]")]
PREFIX = "timm:"
HUB = "hub"
_BACKBONE = Allowed(
    lambda name: name in BACKBONES or re.fullmatch(PREFIX + r"[\w.\-]{1,100}", str(name)) is not None,
    f"one of {', '.join(BACKBONES)}, or {PREFIX}NAME of a model of timm",
)
_CHANNELS = Allowed(lambda count: 16 <= count <= 1024 and count % 16 == 0, "a multiple of 16, at most 1024")


@dataclass(frozen=True)
class VisionConfig(Settings, prefix="model.vision"):
    """How images become tokens; used only by policies with images.

    Attributes:
        backbone: ``convnet`` (small, the default), ``resnet18``, ``vit``, or ``timm:NAME``, a model of the
            package timm.
        crop: side of the crop as a share of the image's: random in training, central otherwise; 1 keeps
            the whole image.
        jitter: brightness, contrast and saturation are multiplied by numbers from 1 - strength to 1 +
            strength in training, drawn for each row and camera, one strength for each of the three; None
            leaves colours alone. Depth maps have none.
        channels: feature maps of the convnet; of the others they are fixed.
        keypoints: places given as coordinates besides the grid of features (spatial softmax, Finn et al.
            2016, "Deep spatial autoencoders"); 0 gives none.
        weights: of a timm model, where training begins: a file (safetensors, or PyTorch's without code) or
            its folder, ``hub`` for the Hugging Face Hub; None: random ones. A checkpoint does not need them.
        frozen: a timm model is left as it is.
    """

    backbone: Annotated[str, _BACKBONE] = "convnet"
    crop: Annotated[float, within("[0.5, 1]")] = 0.9
    jitter: tuple[Strength, Strength, Strength] | None = None
    channels: Annotated[int, _CHANNELS] = 64
    keypoints: Annotated[int, between(0, 1024)] = 32
    weights: str | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"left out but with {self._prefix}backbone={PREFIX}NAME"
        is_own = self.backbone in BACKBONES
        for name, given in (("weights", self.weights), ("frozen", self.frozen)):
            require(not (is_own and given), f"{self._prefix}{name}", given, allowed)
