"""Statistics of a set of demonstrations for a table, also for a damaged set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.data.command_source import commanded_shares
from flowpolicy.data.importers import detect_format, import_demonstrations
from flowpolicy.data.keys import NOT_OBSERVED
from flowpolicy.data.normalization import lost_shares
from flowpolicy.data.rounding import collapses_in_float32
from flowpolicy.data.store import Demonstrations, episode_ends_problem
from flowpolicy.data.versions import version_warning
from flowpolicy.data.zarr_reading import open_store
from flowpolicy.errors import DataError
from flowpolicy.features.image import CHANNELS
from flowpolicy.features.stored import stored_feature
from flowpolicy.runs.progress import progress

_BLOCK_BYTES = 1 << 24
_IMAGES = 4  # dimensions of an array of images


@dataclass(frozen=True)
class KeySummary:
    """One key over all steps; numbers are over its finite entries, NaN where there are none.

    Attributes:
        key: its name.
        shape: shape of one step.
        dtype: numpy's name of the type.
        low: smallest entry.
        high: largest entry.
        mean: mean entry.
        std: standard deviation of the entries.
        constant: flat indices of dimensions that never change (none for images).
        nans: entries that are NaN.
        infinite: entries that are infinite.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    mean: float
    std: float
    constant: tuple[int, ...]
    nans: int
    infinite: int

    def as_dict(self) -> dict[str, Any]:
        """All but the key, for JSON."""
        numbers = {"min": self.low, "max": self.high, "mean": self.mean, "std": self.std}
        counts = {"constant_dims": list(self.constant), "nans": self.nans, "infinite": self.infinite}
        return {"shape": list(self.shape), "dtype": self.dtype, **numbers, **counts}


@dataclass(frozen=True)
class Inspection:
    """Everything the table says.

    Attributes:
        source: the file.
        steps: steps in all.
        lengths: steps of each episode, ``(episodes,)``; None where the episode ends make no sense.
        returns: undiscounted return of each episode, ``(episodes,)``; None without usable rewards.
        keys: one summary per key.
        problem: the sentence with which these data would be refused; None where they are sound.
        arrays: the data themselves, key -> ``(steps, ...)``.
        episode_ends: as stored.
        attributes: as stored.
        collapsing: keys whose numbers float32 cannot tell apart, so that no policy can be trained on them.
        lost_actions: share of the actions that a policy could not give back, by the mode of normalisation;
            empty where the data are not sound.
    """

    source: str
    steps: int
    lengths: NDArray[Any] | None
    returns: NDArray[Any] | None
    keys: list[KeySummary]
    problem: str | None
    arrays: dict[str, NDArray[Any]] = field(repr=False)
    episode_ends: NDArray[Any] = field(repr=False)
    attributes: dict[str, Any] = field(default_factory=dict, repr=False)
    collapsing: tuple[str, ...] = ()
    lost_actions: dict[str, float] = field(default_factory=dict)

    @property
    def cameras(self) -> list[str]:
        """Keys with images that can be shown."""
        return [
            key
            for key, array in self.arrays.items()
            if array.ndim == _IMAGES
            and array.shape[-1] in CHANNELS
            and len(array) == self.steps
            and stored_feature(key, array.dtype, array.shape[1:], self.attributes, self.source).is_frame
        ]


def inspect_demonstrations(path: Path | str, format: str = "auto") -> Inspection:
    """Look at a store, or at a file of any importable format.

    A store is looked at even where training would refuse it (NaNs, wrong episode ends): ``problem`` says why.

    Raises:
        DataError: a file that cannot be read at all.
    """
    name = detect_format(path) if format == "auto" else format
    if name == "diffusion_policy":
        with open_store(path) as store:
            arrays = {key: store.read(key) for key in store.arrays}
            ends, attributes, source = store.read_ends(), store.attributes, str(store.path)
    else:
        demos = import_demonstrations(path, name)
        arrays, ends, attributes, source = demos.arrays, demos.episode_ends, demos.attributes, demos.source
    problem = None
    try:
        Demonstrations(arrays, ends, attributes, source)
    except DataError as error:
        problem = str(error)
    if problem is None and set(arrays) <= set(NOT_OBSERVED):
        problem = f"{source} holds no observation, and a policy needs at least one; import it with more keys."
    steps = max((len(array) for array in arrays.values() if array.ndim), default=0)
    lengths = None
    if steps and episode_ends_problem(ends, steps) is None:
        lengths = np.diff(ends.astype(np.int64), prepend=0)
    lost = {} if problem else lost_shares(torch.from_numpy(arrays["action"].astype(np.float32)))
    return Inspection(
        source=source,
        steps=steps,
        lengths=lengths,
        returns=_returns(arrays.get("reward"), lengths),
        keys=[
            summarise(key, array)
            for key, array in progress(list(arrays.items()), "inspect")
            if array.dtype.kind in "fiub"
        ],
        problem=problem,
        arrays=arrays,
        episode_ends=np.asarray(ends),
        attributes=attributes,
        collapsing=tuple(key for key, array in arrays.items() if collapses_in_float32(array)),
        lost_actions=lost,
    )


def summarise(key: str, array: NDArray[Any]) -> KeySummary:
    """Range, moments, constant dimensions and broken entries of ``array`` ``(steps, ...)``."""
    is_images = array.ndim == _IMAGES
    width = max(1, int(np.prod(array.shape[1:])))
    size = max(1, _BLOCK_BYTES // (8 * width))
    blocks = [slice(start, start + size) for start in range(0, len(array) if array.size else 0, size)]
    if is_images and array.dtype == np.uint8:
        # One pass over what may lie on disk: how often each value occurs says everything.
        counts = sum((np.bincount(array[b].reshape(-1), minlength=256) for b in blocks), np.zeros(256, int))
        levels = np.arange(256.0)
        low = high = np.flatnonzero(counts)
        count, nans, infinite = int(counts.sum()), 0, 0
        mean = float(counts @ levels) / count if count else np.nan
        squares = float(counts @ (levels - mean) ** 2)
    else:
        low, high = np.full(width, np.inf), np.full(width, -np.inf)
        count, total, nans, infinite, squares = 0, 0.0, 0, 0, 0.0
        for block in blocks:
            values = array[block].reshape(-1, width).astype(np.float64)
            finite = np.isfinite(values)
            nans += int(np.isnan(values).sum())
            infinite += int(np.isinf(values).sum())
            low = np.minimum(low, np.where(finite, values, np.inf).min(axis=0))
            high = np.maximum(high, np.where(finite, values, -np.inf).max(axis=0))
            count += int(finite.sum())
            total += float(values[finite].sum())
        mean = total / count if count else np.nan
        for block in blocks:  # a second pass: the difference of large sums would lose the digits
            values = array[block].reshape(-1, width).astype(np.float64)
            squares += float(((values - mean) ** 2)[np.isfinite(values)].sum())
    return KeySummary(
        key=key,
        shape=tuple(array.shape[1:]),
        dtype=array.dtype.name,
        low=float(low.min()) if count else np.nan,
        high=float(high.max()) if count else np.nan,
        mean=float(mean),
        std=float(np.sqrt(squares / count)) if count else np.nan,
        constant=() if is_images else tuple(int(i) for i in np.flatnonzero(low == high)),
        nans=nans,
        infinite=infinite,
    )


def table(inspection: Inspection) -> str:
    """The inspection as text: a head of totals, one line per key, and the verdict."""
    lines = [f"{inspection.source}", f"steps      {inspection.steps}"]
    if inspection.lengths is None:
        lines.append(f"episodes   {inspection.episode_ends.size} ends, which do not fit the steps")
    else:
        lengths = inspection.lengths
        lines.append(f"episodes   {len(lengths)}")
        lines.append(f"length     min {lengths.min()}, median {np.median(lengths):g}, max {lengths.max()}")
    if inspection.returns is not None:
        r = inspection.returns
        lines.append(
            f"return     mean {r.mean():.2f}, std {r.std():.2f}, min {r.min():.2f}, max {r.max():.2f}"
        )
    if inspection.lost_actions:
        shares = (f"{1 - share:.4g} under {mode}" for mode, share in inspection.lost_actions.items())
        lines.append(f"actions    share that comes back from normalisation: {', '.join(shares)}")
    if (commanded := commanded_shares(inspection.arrays)) is not None:
        lines.append(f"commanded  {', '.join(f'{name} {share:.1%}' for name, share in commanded.items())}")
    masks = inspection.attributes.get("masks")
    if isinstance(masks, Mapping) and all(isinstance(numbers, list) for numbers in masks.values()) and masks:
        lines.append(f"masks      {', '.join(f'{name} {len(numbers)}' for name, numbers in masks.items())}")
    for name in ("env_id", "env_version", "source", "imported_from", "licence", "fps"):
        if name in inspection.attributes:
            lines.append(f"{name:<10} {str(inspection.attributes[name])[:100]}")
    warning = version_warning(inspection.attributes)
    if warning is not None:
        lines.append(f"warning    {warning}")
    lines += ["", *_key_lines(inspection.keys), ""]
    if inspection.problem:
        lines.append(f"REFUSED: {inspection.problem}")
    elif inspection.collapsing:
        lines.append(
            f"Sound: ready for training, but not on {', '.join(inspection.collapsing)}: float32 cannot tell "
            "those numbers apart; subtract a constant, in the recording and on the robot."
        )
    else:
        lines.append("Sound: ready for training.")
    return "\n".join(lines)


def metrics(inspection: Inspection) -> dict[str, Any]:
    """The inspection as plain numbers, for ``summary.json``."""
    lengths, returns = inspection.lengths, inspection.returns
    return {
        "episodes": None if lengths is None else len(lengths),
        "length_min": None if lengths is None else int(lengths.min()),
        "length_median": None if lengths is None else float(np.median(lengths)),
        "length_max": None if lengths is None else int(lengths.max()),
        "demo_return_mean": None if returns is None else float(returns.mean()),
        "nans": sum(key.nans for key in inspection.keys),
        "problem": inspection.problem,
        "collapsing": list(inspection.collapsing),
        "lost_actions": inspection.lost_actions,
        "commanded": commanded_shares(inspection.arrays),
        "keys": {key.key: key.as_dict() for key in inspection.keys},
    }


def _key_lines(keys: list[KeySummary]) -> list[str]:
    head = ("key", "shape", "dtype", "min", "max", "mean", "std", "NaN", "inf", "constant dims")
    rows: list[tuple[str, ...]] = [head]
    for key in keys:
        shape = "x".join(map(str, key.shape)) or "-"
        numbers = (f"{value:.4g}" for value in (key.low, key.high, key.mean, key.std))
        rows.append(
            (key.key, shape, key.dtype, *numbers, str(key.nans), str(key.infinite), _some(key.constant))
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [text[0], "  ".join("-" * width for width in widths), *text[1:]]


def _some(indices: tuple[int, ...], limit: int = 8) -> str:
    if not indices:
        return "none"
    shown = ", ".join(map(str, indices[:limit]))
    return shown if len(indices) <= limit else f"{shown}, ... ({len(indices)} in all)"


def _returns(reward: NDArray[Any] | None, lengths: NDArray[Any] | None) -> NDArray[Any] | None:
    if reward is None or lengths is None or reward.size != lengths.sum() or not np.isfinite(reward).all():
        return None
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.asarray(np.add.reduceat(reward.reshape(-1).astype(np.float64), starts))
