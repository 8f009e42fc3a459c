"""Image backbones of the package timm, with weights that somebody else trained, or random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.features.vision.config import HUB, PREFIX, VisionConfig
from flowpolicy.optional import optional

_FILES = ("model.safetensors", "pytorch_model.bin")


class TimmBackbone(nn.Module):
    """A model of timm without its classifier: images in [-1, 1] to the grid of its last features.

    Images are normalised by the model's own constants. Statistics of batches stay as they are in the weights,
    in training too: they would differ between demonstrations, fine-tuning and a robot that sends one image at
    a time. The weights are random until :meth:`load_pretrained`; a checkpoint brings its own.

    Args:
        in_channels: of an image.
        window: height and width of an image.
        config: names the model, and says whether it is frozen.

    Raises:
        ConfigError: timm is not installed, or has no such model for such images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_channels: int, window: tuple[int, int], config: VisionConfig) -> None:
        super().__init__()
        self.config, self.window, self.in_channels = config, window, in_channels
        self.model = self._made()
        patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", (1, 1))
        if any(side % part for side, part in zip(window, patch, strict=True)):
            rows, columns = (-(-side // part) * part for side, part in zip(window, patch, strict=True))
            self.window = rows, columns
            self.model = self._made()
        mean, std = (self.model.pretrained_cfg[name] for name in ("mean", "std"))
        if len(mean) != in_channels:  # as grey images and such with depth have it
            mean, std = ([sum(values) / len(values)] * in_channels for values in (mean, std))
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.requires_grad_(not config.frozen)
        self.train()

    def load_pretrained(self) -> None:
        """Take the weights that ``model.vision.weights`` names; nothing where it names none.

        Raises:
            ConfigError: they cannot be had, or are another model's.
        """
        weights = self.config.weights
        if weights is None:
            return
        overlay = None if weights == HUB else {"state_dict": read_weights(weights)}
        source = self._made(pretrained=True, pretrained_cfg_overlay=overlay)
        self.model.load_state_dict(source.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, F, h, w)``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            normalized = (x * 0.5 + 0.5 - self.mean.to(x.dtype)) / self.std.to(x.dtype)
            down, right = self.window[0] - x.shape[-2], self.window[1] - x.shape[-1]
            if down or right:  # to whole patches, with the colour that is 0
                normalized = F.pad(normalized, (0, right, 0, down))
            return self._grid(self.model.forward_features(normalized))

    def train(self, mode: bool = True) -> Self:
        """What is frozen, and what counts over batches, stays in evaluation."""
        super().train(mode and not self.config.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _made(self, **settings: Any) -> Any:
        with optional(f"model.vision.backbone={self.config.backbone} needs {{name}}", "vision"):
            import timm
        name = self.config.backbone.removeprefix(PREFIX)
        settings |= {"num_classes": 0, "in_chans": self.in_channels}
        try:
            try:  # transformers are made for one size
                return timm.create_model(name, img_size=self.window, **settings)
            except TypeError:
                return timm.create_model(name, **settings)
        except Exception as error:  # whatever timm, the Hub and a file raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
            what = "with these weights " if settings.get("pretrained") else ""
            raise ConfigError(
                f"model.vision.backbone={self.config.backbone} cannot be made {what}({reason}); choose one "
                "of timm.list_models(), and for model.vision.weights a file of that model, hub, or null."
            ) from error

    def _grid(self, features: Tensor) -> Tensor:
        """``(N, F, h, w)`` from what the model has: that, channels last, or tokens."""
        if features.ndim == 4:
            is_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return features.permute(0, 3, 1, 2) if is_last else features
        rows, columns = self.model.patch_embed.grid_size
        tokens = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        grid: Tensor = tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)
        return grid


def load_pretrained(network: nn.Module) -> None:
    """Give every backbone in a new network the weights that its settings name."""
    for module in network.modules():
        if isinstance(module, TimmBackbone):
            module.load_pretrained()


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a file, or of the folder of a model as the Hub has it; no code of it is run.

    Raises:
        ConfigError: there is none, or it holds something else.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = next((file / name for name in _FILES if (file / name).exists()), file / _FILES[0])
    if not file.is_file():
        raise ConfigError(
            f"model.vision.weights: no file {file}; give a file of weights, its folder, or hub."
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        content = torch.load(file, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content)
        if not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError("it holds more than tensors")
        return dict(content)
    except Exception as error:  # a damaged file raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise ConfigError(
            f"model.vision.weights: {file} cannot be read ({reason}); download it again."
        ) from error
