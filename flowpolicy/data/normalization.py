"""Affine normalisation, saved with the policy, so that every public function speaks physical units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowpolicy.errors import DataError
from flowpolicy.settings import require

MODES = ("minmax", "gaussian", "quantile", "none")
_CONSTANT = 1e-6  # a range below this share of the values' magnitude is float32 noise, not information


class Normalizer(nn.Module):
    """Maps physical values to about [-1, 1] and back, one affine map a dimension.

    ``minmax`` maps the data's range to [-1, 1], ``quantile`` its 1% to 99% range, ``gaussian`` its mean
    to 0 and its standard deviation to 1. A constant dimension maps to 0 and back to its constant.
    Values outside the data's range are extrapolated up to ``clip`` (in normalised units) and held there:
    a robot that leaves the demonstrated range is still seen, a broken sensor does not blow up the network.

    Buffers: ``center`` and ``scale``, each of the data's shape for one step.
    """

    center: Tensor
    scale: Tensor
    inverse_scale: Tensor

    def __init__(self, shape: tuple[int, ...], mode: str = "minmax", clip: float = 5.0) -> None:
        super().__init__()
        require(mode in MODES, "normalization", mode, f"one of {', '.join(MODES)}")
        require(clip >= 1.0, "normalization clip", clip, "at least 1")
        self.mode, self.clip = mode, clip
        self.register_buffer("center", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("inverse_scale", torch.ones(shape), persistent=False)

    @classmethod
    def fit(cls, data: Tensor, mode: str = "minmax", clip: float = 5.0) -> Normalizer:
        """Statistics of ``data`` ``(steps, *shape)``.

        Raises:
            DataError: when there is no data or it is not finite.
        """
        if len(data) == 0 or not torch.isfinite(data).all():
            raise DataError("Normalisation statistics need at least one row and finite values only.")
        normalizer = cls(tuple(data.shape[1:]), mode, clip)
        data = data.double()
        if mode == "none":
            return normalizer
        if mode == "gaussian":
            center, scale = data.mean(0), data.std(0, correction=0)
        else:
            if mode == "quantile":
                # torch.quantile refuses large inputs; a sort along the steps does not
                ordered = data.sort(dim=0).values
                last = len(data) - 1
                low, high = ordered[round(0.01 * last)], ordered[round(0.99 * last)]
            else:
                low, high = data.amin(0), data.amax(0)
            center, scale = (high + low) / 2, (high - low) / 2
        is_constant = scale <= _CONSTANT * center.abs().clamp(min=1.0)
        # A dimension that is constant between its quantiles may still move: fall back on its full range.
        if mode == "quantile":
            low, high = data.amin(0), data.amax(0)
            full = (high - low) / 2
            rescued = is_constant & (full > _CONSTANT * center.abs().clamp(min=1.0))
            center, scale = torch.where(rescued, (high + low) / 2, center), torch.where(rescued, full, scale)
            is_constant = is_constant & ~rescued
        normalizer.center.copy_(torch.where(is_constant, data[0], center))
        normalizer.scale.copy_(torch.where(is_constant, torch.zeros_like(scale), scale))
        normalizer.refresh()
        return normalizer

    def refresh(self) -> None:
        """Derive the reciprocal from ``scale``; 0 where the dimension is constant."""
        self.inverse_scale.copy_(torch.where(self.scale > 0, 1.0 / self.scale, torch.zeros_like(self.scale)))

    def normalize(self, values: Tensor) -> Tensor:
        """Physical ``(..., *shape)`` to normalised, held within +-``clip``."""
        return ((values - self.center) * self.inverse_scale).clamp(-self.clip, self.clip)

    def denormalize(self, values: Tensor) -> Tensor:
        """Normalised ``(..., *shape)`` to physical units."""
        return values * self.scale + self.center

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"shape={tuple(self.center.shape)}, mode={self.mode}, clip={self.clip}"
