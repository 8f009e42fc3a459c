"""Backbones: from images ``(N, C, H, W)`` in [-1, 1] to a grid of features ``(N, F, h, w)``.

All of them normalise by groups or tokens: statistics of a batch would differ between training on
demonstrations, fine-tuning, and a robot that sends one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpolicy.features.vision.config import PREFIX, VisionConfig
from flowpolicy.features.vision.pretrained import TimmBackbone


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm around a shortcut (He et al. 2016), halving the grid if asked."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.GroupNorm(8, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels_in, h, w)`` to ``(N, channels, h / stride, w / stride)``."""
        hidden = F.relu(self.first_norm(self.first(x)))
        result: Tensor = F.relu(self.shortcut(x) + self.second_norm(self.second(hidden)))
        return result


def convnet(in_channels: int, config: VisionConfig) -> nn.Sequential:
    """A small convolutional net, at most 30 MFLOP for an image of 96 x 96: one eighth of each side."""
    half, full = config.channels // 2, config.channels
    return nn.Sequential(
        nn.Conv2d(in_channels, half, 5, 4, 2, bias=False),
        nn.GroupNorm(8, half),
        nn.ReLU(),
        nn.Conv2d(half, full, 3, 2, 1, bias=False),
        nn.GroupNorm(8, full),
        nn.ReLU(),
        Residual(full, full),
    )


def resnet18(in_channels: int, config: VisionConfig) -> nn.Sequential:
    """ResNet-18 (He et al. 2016) with group norm, from scratch: one thirty-second of each side."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(before, channels, stride), Residual(channels, channels)]
        before = channels
    return nn.Sequential(*layers)


class VisionTransformer(nn.Module):
    """A small ViT (Dosovitskiy et al. 2021) with a convolutional stem: one eighth of each side.

    Positions are sines and cosines of the place in the grid, so that any size of image will do.
    """

    WIDTH, DEPTH, HEADS = 128, 4, 4

    def __init__(self, in_channels: int, config: VisionConfig) -> None:
        super().__init__()
        width = self.WIDTH
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 48, 5, 4, 2), nn.GELU(), nn.Conv2d(48, width, 3, 2, 1)
        )
        layer = nn.TransformerEncoderLayer(
            width, self.HEADS, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, self.DEPTH, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, F, h, w)``."""
        grid = self.stem(x)
        height, width = grid.shape[-2:]
        tokens = grid.flatten(2).transpose(1, 2)
        position = grid_positions(height, width, self.WIDTH, tokens.device).to(tokens.dtype)
        tokens = self.layers(tokens + position)
        result: Tensor = tokens.transpose(1, 2).unflatten(2, (height, width))
        return result


def grid_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of row and column, ``(height * width, channels)``."""
    frequencies = 100.0 ** (-torch.arange(channels // 4, device=device) / (channels // 4))
    rows = torch.arange(height, device=device)[:, None] * frequencies
    columns = torch.arange(width, device=device)[:, None] * frequencies
    rows = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, width, -1)
    columns = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


Build = Callable[[int, VisionConfig], nn.Module]
BUILDERS: dict[str, Build] = {"convnet": convnet, "resnet18": resnet18, "vit": VisionTransformer}


def build_backbone(in_channels: int, window: tuple[int, int], config: VisionConfig) -> nn.Module:
    """The backbone of these settings for images of ``window``, height and width, with random weights."""
    if config.backbone.startswith(PREFIX):
        return TimmBackbone(in_channels, window, config)
    return BUILDERS[config.backbone](in_channels, config)
