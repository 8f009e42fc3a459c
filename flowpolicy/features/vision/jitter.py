"""Colour jitter: brightness, contrast and saturation that vary at random, as augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the grey of a colour (ITU-R BT.601)."""


def jittered(images: Tensor, strengths: Sequence[float]) -> Tensor:
    """Images ``(B, T_o, H, W, C)`` from 0 to 255, float32, of other colours in each row and the same in all
    images of a history.

    Brightness multiplies every value; contrast scales the distance from the image's mean grey, saturation
    that from the pixel's own grey, as torchvision's ``ColorJitter`` does, in this order. A fourth channel,
    which is no colour, stays; one channel has no saturation. Random numbers are drawn on the images' device.

    Args:
        images: uint8 or float.
        strengths: of brightness, contrast and saturation; each factor is drawn from 1 - strength to
            1 + strength.
    """
    colours = min(images.shape[-1], 3)
    result, rest = images[..., :colours].float(), images[..., colours:].float()
    drawn = 2 * torch.rand(3, len(images), 1, 1, 1, 1, device=images.device) - 1
    brightness, contrast, saturation = (
        1 + strength * part for strength, part in zip(strengths, drawn.unbind(0), strict=True)
    )
    result = (result * brightness).clamp(0, 255)
    mean = _grey(result).mean((2, 3), keepdim=True)
    result = torch.lerp(mean.expand_as(result), result, contrast).clamp(0, 255)
    if colours > 1:
        result = torch.lerp(_grey(result).expand_as(result), result, saturation).clamp(0, 255)
    return torch.cat([result, rest], -1)


def _grey(images: Tensor) -> Tensor:
    """``(..., C)`` to ``(..., 1)``."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = (share * images[..., i : i + 1] for i, share in enumerate(_LUMA))
    return red + green + blue
