"""One camera: a history of images to tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.features.vision.backbones import BUILDERS
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.features.vision.jitter import jittered

SMALLEST = 32  # pixels a side
MOST_TOKENS = 64


class ImageEncoder(nn.Module):
    """Images of one camera to spatial tokens: crop, backbone, one token for each place of its grid, or for
    each four of a fine one.

    With ``keypoints`` there is one more token for each image: the expected coordinates under a softmax over
    the grid, which say where a thing is more finely than the grid does.

    Args:
        shape: height, width, channels of one image.
        obs_horizon: T_o.
        width: channels of a token, d.
        config: settings.
    """

    grid_x: Tensor
    grid_y: Tensor

    def __init__(self, shape: tuple[int, ...], obs_horizon: int, width: int, config: VisionConfig) -> None:
        super().__init__()
        height, breadth, channels = shape
        self.window = (round(config.crop * height), round(config.crop * breadth))
        if min(self.window) < SMALLEST:
            raise ConfigError(
                f"An image of {height} x {breadth} pixels, cropped to {self.window[0]} x "
                f"{self.window[1]}, is too small; give images whose crop is at least {SMALLEST} x {SMALLEST}."
            )
        self.jitter = config.jitter
        self.backbone = BUILDERS[config.backbone](channels, config)
        with torch.no_grad():
            grid = self.backbone(torch.zeros(1, channels, *self.window)).shape
        features, rows, columns = int(grid[1]), int(grid[2]), int(grid[3])
        # Where the grid is fine, four places make a token: many tokens cost more than they say.
        size, padding = (2, 1) if rows * columns > MOST_TOKENS else (1, 0)
        self.project = nn.Conv2d(features, width, size, size, padding)
        self.norm = nn.LayerNorm(width)
        self.heat = nn.Conv2d(features, config.keypoints, 1) if config.keypoints else None
        self.place = nn.Linear(2 * config.keypoints, width) if config.keypoints else None
        places = (rows + 2 * padding) // size * ((columns + 2 * padding) // size)
        self.tokens_per_image = places + (self.place is not None)
        self.num_tokens = obs_horizon * self.tokens_per_image
        self.position = nn.Parameter(torch.randn(self.num_tokens, width).mul_(0.02))
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        self.register_buffer("grid_x", x.flatten(), persistent=False)
        self.register_buffer("grid_y", y.flatten(), persistent=False)
        # Channels last is the layout in which a CPU convolves fastest, and the one images come in.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Tokens ``(B, num_tokens, d)`` of images ``(B, T_o, H, W, C)``, 0 to 255, uint8 or float."""
        batch = len(images)
        cropped = self._cropped(images)
        if self.jitter is not None and self.training:
            cropped = jittered(cropped, self.jitter)
        cropped = cropped.flatten(0, 1)
        pixels = cropped.to(self.project.weight.dtype).permute(0, 3, 1, 2)
        grid = self.backbone(pixels / 127.5 - 1.0)
        tokens = self.project(grid).flatten(2).transpose(1, 2)
        if self.heat is not None and self.place is not None:
            heat = torch.softmax(self.heat(grid).flatten(2).float(), dim=-1)
            places = torch.cat([heat @ self.grid_x.float(), heat @ self.grid_y.float()], -1)
            tokens = torch.cat([tokens, self.place(places.to(tokens.dtype))[:, None]], 1)
        tokens = self.norm(tokens).reshape(batch, self.num_tokens, -1)
        result: Tensor = tokens + self.position
        return result

    def _cropped(self, images: Tensor) -> Tensor:
        """The window of each row of the batch, the same in all images of a history."""
        (height, width), (rows, columns) = images.shape[2:4], self.window
        down, right = height - rows, width - columns
        if down == 0 and right == 0:
            return images
        if not self.training:
            top, left = down // 2, right // 2
            return images[:, :, top : top + rows, left : left + columns]
        if images.is_cuda:  # drawn and cut there, without waiting for it
            first, last = (
                torch.randint(free + 1, (len(images), 1), device=images.device)
                + torch.arange(side, device=images.device)
                for free, side in ((down, rows), (right, columns))
            )
            batch = torch.arange(len(images), device=images.device)
            return images[batch[:, None, None], :, first[:, :, None], last[:, None]].permute(0, 3, 1, 2, 4)
        # One copy of a block each: an index over pixels takes longer than the rest of the encoder's layers.
        tops = torch.randint(down + 1, (len(images),)).tolist()
        lefts = torch.randint(right + 1, (len(images),)).tolist()
        windows = [
            row[:, top : top + rows, left : left + columns]
            for row, top, left in zip(images, tops, lefts, strict=True)
        ]
        return torch.stack(windows)
