"""Affine normalisation, saved with the policy, so that every public function uses physical units."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowpolicy.errors import DataError
from flowpolicy.settings import require

MODES = ("minmax", "gaussian", "quantile", "none")
TOLERANCE = 1e-4
"""Share of a dimension's range within which a value that comes back has come back."""
LARGEST_CLIP = 1e6
USUAL_CLIPS = {"minmax": 1.0, "gaussian": 5.0, "quantile": 1.0}
"""Bounds of an action in normalised units; not to normalise has none."""
_ROUNDINGS = 8  # a range of so many roundings of the largest value is noise: a millionth of it in float32


class Normalizer(nn.Module):
    """Maps physical values to about [-1, 1] and back, one affine map a dimension.

    ``minmax`` maps the data's range to [-1, 1], ``quantile`` its 1% to 99% range, ``gaussian`` its mean
    to 0 and its standard deviation to 1. A constant dimension maps to 0 and back to its constant.
    Values outside the data's range are extrapolated up to ``clip`` (in normalised units) and held there:
    a robot that leaves the demonstrated range is still represented, and a broken sensor stays bounded.
    Entries outside ``entries``, bool of the data's shape, have a range of their own: they stay as they are.

    Buffers: ``center`` and ``scale``, each of the data's shape for one step; they are all of its state.
    """

    center: Tensor
    scale: Tensor
    limit: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        mode: str = "minmax",
        clip: float = 5.0,
        *,
        entries: NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__()
        require(mode in MODES, "normalization", mode, f"one of {', '.join(MODES)}")
        require(1.0 <= clip <= LARGEST_CLIP, "normalization clip", clip, f"from 1 to {LARGEST_CLIP:g}")
        self.mode, self.clip = mode, clip
        self.register_buffer("center", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        limit = None
        if entries is not None and not entries.all():
            limit = torch.as_tensor(np.where(entries, clip, np.inf), dtype=torch.float32)
        self.register_buffer("limit", limit, persistent=False)

    @classmethod
    def fit(
        cls,
        data: Tensor,
        mode: str = "minmax",
        clip: float = 5.0,
        *,
        entries: NDArray[np.bool_] | None = None,
        keep_all: bool = False,
    ) -> Normalizer:
        """Statistics of ``data`` ``(steps, *shape)``.

        With ``keep_all`` no value of ``data`` lies beyond ``clip``: the map of a dimension that would lose
        some is moved towards that of its full range, as far as it takes and no further.

        Raises:
            DataError: when there is no data or it is not finite.
        """
        if len(data) == 0 or not torch.isfinite(data).all():
            raise DataError("Normalisation statistics need at least one row and finite values only.")
        normalizer = cls(tuple(data.shape[1:]), mode, clip, entries=entries)
        if mode == "none":
            return normalizer
        eps = torch.finfo(data.dtype).eps if data.is_floating_point() else 0.0
        data = data.double()
        middle, half = _minmax(data)
        is_constant = _is_constant(middle, half, eps)
        center, scale = _STATISTICS[mode](data)
        # A dimension that is constant between its quantiles may still move: it takes its full range.
        is_hidden = _is_constant(center, scale, eps)
        center, scale = torch.where(is_hidden, middle, center), torch.where(is_hidden, half, scale)
        if keep_all:
            excess = half + (center - middle).abs() - clip * scale
            share = torch.where(excess > 0, excess / (excess + (clip - 1) * half), 0.0)
            center, scale = torch.lerp(center, middle, share), torch.lerp(scale, half, share)
        normalizer.center.copy_(torch.where(is_constant, data[0], center))
        normalizer.scale.copy_(torch.where(is_constant, 0.0, scale))
        if normalizer.limit is not None:
            stays = normalizer.limit.isinf()
            normalizer.center.masked_fill_(stays, 0.0)
            normalizer.scale.masked_fill_(stays, 1.0)
        return normalizer

    @property
    def inverse_scale(self) -> Tensor:
        """1 / scale, and 0 where the dimension is constant."""
        return torch.nan_to_num(self.scale.reciprocal(), posinf=0.0)

    @property
    def _bound(self) -> float | Tensor:
        return self.clip if self.limit is None else self.limit

    def normalize(self, values: Tensor) -> Tensor:
        """Physical ``(..., *shape)`` to normalised, held within +-``clip``."""
        return _mapped(values, self.center, self.inverse_scale, self._bound)

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """``normalize`` by the statistics of this moment, for many calls: the reciprocal is taken once."""
        center, inverse, bound = self.center.clone(), self.inverse_scale, self._bound
        return lambda values: _mapped(values, center, inverse, bound)

    def denormalize(self, values: Tensor) -> Tensor:
        """Normalised ``(..., *shape)`` to physical units."""
        return values * self.scale + self.center

    def lost(self, data: Tensor, bound: float = math.inf) -> Tensor:
        """Which entries of ``data`` ``(steps, *shape)`` do not come back when they are normalised, held
        within +-``bound`` and denormalised: bool, of the same shape.

        An entry is lost where it is off by more than :data:`TOLERANCE` of its dimension's range, and by more
        than a millionth of the dimension's largest value, which is about what float32 resolves.
        """
        back = self.denormalize(self.normalize(data).clamp(-bound, bound))
        middle, half = _minmax(data.double())
        resolved = _ROUNDINGS * torch.finfo(torch.float32).eps * (middle.abs() + half)
        return (back.double() - data).abs() > torch.maximum(2 * TOLERANCE * half, resolved)

    def lost_share(self, data: Tensor, bound: float = math.inf) -> float:
        """Share of the rows of ``data`` ``(steps, *shape)`` of which an entry is lost; see :meth:`lost`."""
        return float(self.lost(data, bound).reshape(len(data), -1).any(1).float().mean())

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"shape={tuple(self.center.shape)}, mode={self.mode}, clip={self.clip}"


def lost_shares(action: Tensor) -> dict[str, float]:
    """Share of demonstrated actions ``(steps, A)`` that a policy could not give back, by the mode of their
    normalisation, each at its usual clip.
    """
    shares = {}
    for mode, clip in USUAL_CLIPS.items():
        normalizer = Normalizer.fit(action, mode, clip, keep_all=True)
        shares[mode] = normalizer.lost_share(action, clip)
    return shares


def _mapped(values: Tensor, center: Tensor, inverse: Tensor, bound: float | Tensor) -> Tensor:
    normalized = (values - center) * inverse
    return normalized.clamp(-bound, bound)  # type: ignore[arg-type]  # of numbers or of tensors


def _is_constant(center: Tensor, half: Tensor, eps: float) -> Tensor:
    """Whether a range is the rounding of its values, or too small to divide by in float32."""
    return half <= (_ROUNDINGS * eps * (center.abs() + half)).clamp(min=torch.finfo(torch.float32).tiny)


def _gaussian(data: Tensor) -> tuple[Tensor, Tensor]:
    return data.mean(0), data.std(0, correction=0)


def _minmax(data: Tensor) -> tuple[Tensor, Tensor]:
    low, high = data.amin(0), data.amax(0)
    return (high + low) / 2, (high - low) / 2


def _quantile(data: Tensor) -> tuple[Tensor, Tensor]:
    # torch.quantile refuses large inputs; a sort along the steps does not
    ordered = data.sort(dim=0).values
    last = len(data) - 1
    low, high = ordered[round(0.01 * last)], ordered[round(0.99 * last)]
    return (high + low) / 2, (high - low) / 2


_STATISTICS = {"gaussian": _gaussian, "minmax": _minmax, "quantile": _quantile}
