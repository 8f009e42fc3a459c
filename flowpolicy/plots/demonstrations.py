"""Pictures of demonstrations: a histogram of every dimension, and a sheet of episodes to glance over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.inspection import Inspection
from flowpolicy.errors import DataError
from flowpolicy.plots.figure import BLUE, GREY, ORANGE, PALE, house_figure, say
from flowpolicy.rounding import three_digits

_MAX_DIMENSIONS = 400


def draw_histograms(inspection: Inspection, folder: Path) -> list[Path]:
    """One PNG per low-dimensional key, ``histogram_<key>.png``, with a panel for every dimension.

    Non-finite entries are left out; a constant dimension says so instead of showing a single bar.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    return [
        _draw_histograms(key, array.reshape(len(array), -1), folder / f"histogram_{_file_name(key)}.png")
        for key, array in inspection.arrays.items()
        if array.dtype.kind in "fiub" and array.ndim < 4 and array.size
    ]


def draw_contact_sheet(inspection: Inspection, path: Path) -> Path:
    """One PNG of episodes spread over the set.

    Frames in rows where there are images; paths in the plane where actions have two dimensions; otherwise
    the actions of each episode as a heat map over time.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: the episode ends or actions are unusable.
    """
    action, lengths = inspection.arrays.get("action"), inspection.lengths
    if lengths is None or action is None or action.ndim != 2 or len(action) != inspection.steps:
        raise DataError(f"{inspection.source}: no contact sheet, as the episodes cannot be told apart.")
    episodes = [slice(end - length, end) for end, length in zip(np.cumsum(lengths), lengths, strict=True)]
    images = [inspection.arrays[key] for key in inspection.cameras]
    name = Path(inspection.source).name
    if images:
        return _frame_sheet(name, images[0], episodes, path)
    if action.shape[1] == 2:
        return _path_sheet(name, action, episodes, path)
    return _heat_sheet(name, action, episodes, inspection.returns, path)


def _draw_histograms(key: str, rows: NDArray[Any], path: Path) -> Path:
    count = min(rows.shape[1], _MAX_DIMENSIONS)
    columns = min(count, 8 if count > 24 else 6 if count > 8 else 4)
    more = f", first {count} of {rows.shape[1]} dimensions" if count < rows.shape[1] else ""
    with _panels(path, count, columns, (2.0, 1.45), f"{key}: {len(rows):,} steps{more}") as (_, axes):
        for i, axis in enumerate(axes[:count]):
            name = f"{key}[{i}]" if rows.shape[1] > 1 else key
            _histogram(axis, rows[:, i].astype(np.float64), name, ORANGE if key == "action" else BLUE)
        _hide(axes[count:])
    return path


def _histogram(axis: Any, values: NDArray[np.float64], title: str, color: str) -> None:
    finite = values[np.isfinite(values)]
    broken = len(values) - len(finite)
    axis.set_title(title + (f"  ({broken} not finite)" if broken else ""))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    if len(finite) == 0 or finite.min() == finite.max():
        say(axis, f"always {finite[0]:.4g}" if len(finite) else "no finite entry", fontsize=7.5)
        axis.set_xticks([])
        return
    axis.hist(finite, bins=48, histtype="stepfilled", color=color, linewidth=0)
    axis.axvline(finite.mean(), color=GREY, linewidth=0.8)
    axis.locator_params(axis="x", nbins=4)
    axis.set_xlim(finite.min(), finite.max())


def _frame_sheet(name: str, images: NDArray[Any], episodes: list[slice], path: Path) -> Path:
    columns, chosen = 8, _spread(len(episodes), 6)
    title = f"{name}: frames, evenly spaced in time"
    with _panels(path, columns * len(chosen), columns, (1.4, 1.42), title) as (_, axes):
        for episode, row in zip(chosen, axes.reshape(-1, columns), strict=True):
            part = episodes[episode]
            for axis, step in zip(row, np.linspace(part.start, part.stop - 1, columns).round(), strict=True):
                axis.imshow(_picture(images[int(step)]), interpolation="nearest")
                axis.set_title(f"step {int(step) - part.start}", color=GREY)
                _bare(axis)
            row[0].set_ylabel(f"episode {episode}")
    return path


def _path_sheet(name: str, action: NDArray[Any], episodes: list[slice], path: Path) -> Path:
    chosen = _spread(len(episodes), 24)
    finite = action[np.isfinite(action).all(axis=1)]
    low, high = finite.min(axis=0), finite.max(axis=0)
    margin = 0.04 * (high - low + 1e-9)
    title = f"{name}: action[0] against action[1], dark to bright in time, dot: start"
    with _panels(path, len(chosen), min(len(chosen), 6), (1.75, 1.85), title) as (_, axes):
        for axis, episode in zip(axes, chosen, strict=False):
            line = action[episodes[episode]]
            axis.plot(*line.T, color=GREY, linewidth=0.4, alpha=0.6)
            axis.scatter(*line.T, c=np.linspace(0, 1, len(line)), cmap="plasma", s=3, linewidths=0)
            axis.plot(*line[0], "o", color="black", markersize=3.5)
            axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
            axis.set_ylim(low[1] - margin[1], high[1] + margin[1])
            axis.set_title(f"episode {episode}, {len(line)} steps")
            _bare(axis)
        _hide(axes[len(chosen) :])
    return path


def _heat_sheet(
    name: str, action: NDArray[Any], episodes: list[slice], returns: NDArray[Any] | None, path: Path
) -> Path:
    chosen = _spread(len(episodes), 12)
    height = 0.5 + min(1.6, 0.055 * action.shape[1] + 0.25)
    with np.errstate(invalid="ignore"):
        middle, spread = np.nanmean(action, axis=0), np.nanstd(action, axis=0)
    scaled = (action - middle) / np.where(spread > 0, spread, 1.0)
    title = f"{name}: actions (rows) over steps, red above and blue below the mean"
    with _panels(path, len(chosen), min(len(chosen), 3), (3.7, height), title) as (_, axes):
        for axis, episode in zip(axes, chosen, strict=False):
            part = scaled[episodes[episode]].T
            axis.imshow(part, aspect="auto", cmap="RdBu_r", vmin=-2.5, vmax=2.5, interpolation="nearest")
            total = "" if returns is None else f", return {three_digits(returns[episode])}"
            axis.set_title(f"episode {episode}{total}")
            axis.locator_params(axis="y", nbins=4, integer=True)
            axis.spines[:].set_visible(False)
        _hide(axes[len(chosen) :])
    return path


def _panels(path: Path, count: int, columns: int, each: tuple[float, float], title: str) -> Any:
    """A figure of at least ``count`` small panels of this size in inches."""
    rows = math.ceil(count / columns)
    width, height = each[0] * columns, each[1] * rows + 0.7
    return house_figure(path, columns=columns, rows=rows, width=width, height=height, title=title, small=True)


def _hide(axes: Any) -> None:
    for axis in axes:
        axis.set_visible(False)


def _bare(axis: Any) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(color=PALE, visible=True)


def _picture(image: NDArray[Any]) -> NDArray[Any]:
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    if image.dtype == np.uint8:
        return image
    top = 255.0 if np.nanmax(image) > 1 else 1.0
    return np.asarray(np.clip(np.nan_to_num(image) / top, 0, 1))


def _spread(count: int, wanted: int) -> list[int]:
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, wanted)).round())]


def _file_name(key: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in key)
