"""Pictures of demonstrations: a histogram of every dimension, and a sheet of episodes to glance over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.inspection import Inspection
from flowpolicy.errors import DataError
from flowpolicy.files.storage import atomic_file

_INK = "#22313f"
_FAINT = "#8a97a3"
_BAR = {"action": "#d1603d"}
_OTHER_BAR = "#2a6f97"
_MAX_DIMENSIONS = 400
_ROWS, _COLUMNS = 6, 8


def draw_histograms(inspection: Inspection, folder: Path) -> list[Path]:
    """One PNG per low-dimensional key, ``histogram_<key>.png``, with a panel for every dimension.

    Non-finite entries are left out; a constant dimension says so instead of showing a single bar.

    Raises:
        DataError: matplotlib is not installed.
    """
    paths = []
    for key, array in inspection.arrays.items():
        if array.dtype.kind in "fiub" and array.ndim < 4 and array.size:
            path = folder / f"histogram_{_file_name(key)}.png"
            _save(_histograms(key, array.reshape(len(array), -1)), path)
            paths.append(path)
    return paths


def draw_contact_sheet(inspection: Inspection, path: Path) -> Path:
    """One PNG of episodes spread over the set.

    Frames in rows where there are images; paths in the plane where actions have two dimensions; otherwise
    the actions of each episode as a heat map over time.

    Raises:
        DataError: matplotlib is not installed, or the episode ends or actions are unusable.
    """
    action = inspection.arrays.get("action")
    if inspection.lengths is None or action is None or action.ndim != 2 or len(action) != inspection.steps:
        raise DataError(f"{inspection.source}: no contact sheet, as the episodes cannot be told apart.")
    images = [inspection.arrays[key] for key in inspection.cameras]
    if images:
        figure = _frame_sheet(inspection, images[0])
    elif action.shape[1] == 2:
        figure = _path_sheet(inspection, action)
    else:
        figure = _heat_sheet(inspection, action)
    _save(figure, path)
    return path


def _histograms(key: str, rows: NDArray[Any]) -> Any:
    dimensions = min(rows.shape[1], _MAX_DIMENSIONS)
    columns = min(dimensions, 8 if dimensions > 24 else 6 if dimensions > 8 else 4)
    lines = math.ceil(dimensions / columns)
    figure, axes = _figure(lines, columns, (2.0 * columns, 1.45 * lines + 0.7))
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < dimensions)
        if i < dimensions:
            _histogram(
                axis, rows[:, i], f"{key}[{i}]" if rows.shape[1] > 1 else key, _BAR.get(key, _OTHER_BAR)
            )
    more = f", first {dimensions} of {rows.shape[1]} dimensions" if dimensions < rows.shape[1] else ""
    figure.suptitle(f"{key}   {len(rows):,} steps{more}", x=0.01, ha="left", fontsize=11, color=_INK)
    return figure


def _histogram(axis: Any, values: NDArray[Any], title: str, colour: str) -> None:
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    broken = len(numbers) - len(finite)
    axis.set_title(
        title + (f"  ({broken} not finite)" if broken else ""), fontsize=7.5, color=_INK, loc="left", pad=3
    )
    axis.set_yticks([])
    axis.tick_params(labelsize=6.5, colors=_FAINT, length=2)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT)
    if len(finite) == 0 or finite.min() == finite.max():
        text = f"always {finite[0]:.4g}" if len(finite) else "no finite entry"
        axis.text(
            0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=7.5, color=_FAINT
        )
        axis.set_xticks([])
        return
    axis.hist(finite, bins=48, histtype="stepfilled", color=colour, linewidth=0)
    axis.axvline(finite.mean(), color=_INK, linewidth=0.8, alpha=0.7)
    axis.locator_params(axis="x", nbins=4)
    axis.set_xlim(finite.min(), finite.max())


def _frame_sheet(inspection: Inspection, images: NDArray[Any]) -> Any:
    assert inspection.lengths is not None
    chosen = _spread(len(inspection.lengths), _ROWS)
    figure, axes = _figure(len(chosen), _COLUMNS, (1.35 * _COLUMNS + 0.7, 1.42 * len(chosen) + 0.6))
    starts = np.cumsum(inspection.lengths) - inspection.lengths
    for line, episode in zip(axes, chosen, strict=True):
        steps = np.linspace(0, inspection.lengths[episode] - 1, _COLUMNS).round().astype(int)
        for axis, step in zip(line, steps, strict=True):
            axis.imshow(_picture(images[starts[episode] + step]), interpolation="nearest")
            axis.set_title(f"step {step}", fontsize=6.5, color=_FAINT, pad=2)
            _bare(axis)
        line[0].set_ylabel(f"episode {episode}", fontsize=8, color=_INK)
    return _titled(figure, inspection, "frames, evenly spaced in time")


def _path_sheet(inspection: Inspection, action: NDArray[Any]) -> Any:
    assert inspection.lengths is not None
    chosen = _spread(len(inspection.lengths), 24)
    columns = min(len(chosen), 6)
    lines = math.ceil(len(chosen) / columns)
    figure, axes = _figure(lines, columns, (1.75 * columns, 1.85 * lines + 0.7))
    finite = action[np.isfinite(action).all(axis=1)]
    low, high = finite.min(axis=0), finite.max(axis=0)
    margin = 0.04 * (high - low + 1e-9)
    starts = np.cumsum(inspection.lengths) - inspection.lengths
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < len(chosen))
        if i >= len(chosen):
            continue
        episode = chosen[i]
        path = action[starts[episode] : starts[episode] + inspection.lengths[episode]]
        axis.plot(*path.T, color=_FAINT, linewidth=0.4, alpha=0.6)
        axis.scatter(*path.T, c=np.linspace(0, 1, len(path)), cmap="plasma", s=3, linewidths=0)
        axis.plot(*path[0], "o", color=_INK, markersize=3.5)
        axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axis.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axis.set_title(f"episode {episode}, {len(path)} steps", fontsize=7, color=_INK, pad=3)
        _bare(axis)
    return _titled(figure, inspection, "action[0] against action[1], dark to bright in time, dot: start")


def _heat_sheet(inspection: Inspection, action: NDArray[Any]) -> Any:
    assert inspection.lengths is not None
    chosen = _spread(len(inspection.lengths), 12)
    columns = min(len(chosen), 3)
    lines = math.ceil(len(chosen) / columns)
    height = 0.5 + min(1.6, 0.055 * action.shape[1] + 0.25)
    figure, axes = _figure(lines, columns, (3.7 * columns, height * lines + 0.8))
    with np.errstate(invalid="ignore"):
        middle, spread = np.nanmean(action, axis=0), np.nanstd(action, axis=0)
    scaled = (action - middle) / np.where(spread > 0, spread, 1.0)
    starts = np.cumsum(inspection.lengths) - inspection.lengths
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < len(chosen))
        if i >= len(chosen):
            continue
        episode = chosen[i]
        part = scaled[starts[episode] : starts[episode] + inspection.lengths[episode]].T
        axis.imshow(part, aspect="auto", cmap="RdBu_r", vmin=-2.5, vmax=2.5, interpolation="nearest")
        total = "" if inspection.returns is None else f", return {inspection.returns[episode]:.0f}"
        axis.set_title(f"episode {episode}{total}", fontsize=8, color=_INK, loc="left", pad=3)
        axis.tick_params(labelsize=6.5, colors=_FAINT, length=2)
        axis.locator_params(axis="y", nbins=4, integer=True)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return _titled(figure, inspection, "actions (rows) over steps, red above and blue below the mean")


def _figure(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("Plots need matplotlib; install it with: pip install 'flowpolicy[train]'.") from error
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False)


def _titled(figure: Any, inspection: Inspection, what: str) -> Any:
    figure.suptitle(f"{Path(inspection.source).name}   {what}", x=0.01, ha="left", fontsize=10, color=_INK)
    return figure


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("#d5dbe0")


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
