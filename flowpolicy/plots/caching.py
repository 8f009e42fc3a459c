"""Pictures of schedules and similarities."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.acceleration.caching.similarity import Similarity
from flowpolicy.plots.figure import BLUE, house_figure


def plot_schedules(schedules: dict[str, Schedule], path: Path | str, *, title: str = "") -> Path:
    """Blocks against evaluations, a panel a schedule; what is recomputed is dark."""
    from matplotlib.colors import ListedColormap

    some = next(iter(schedules.values()))
    blocks, size = some.key.blocks, some.key.num_evaluations
    height = 0.5 + 0.11 * len(blocks)
    total, rows = 0.6 + height * len(schedules), len(schedules)
    with house_figure(path, columns=1, rows=rows, width=8.0, height=total) as (figure, axes):
        figure.suptitle(title)
        for ax, (name, schedule) in zip(axes, schedules.items(), strict=True):
            grid = np.zeros((len(blocks), size))
            for row, steps in enumerate(schedule.updates):
                grid[row, list(steps)] = 1
            ax.imshow(grid, aspect="auto", interpolation="nearest", cmap=ListedColormap(["#EEF1F4", BLUE]))
            error = schedule.calibration.get("rms_error")
            note = "" if error is None else f", rms error {error:.3g}"
            ax.set_title(f"{name}: {schedule.share:.1%} recomputed{note}")
            ax.grid(False)
            ticks = range(0, len(blocks), 3)
            ax.set_yticks(list(ticks), [f"layer {blocks[i].split('.')[0]}" for i in ticks], fontsize=7)
        axes[-1].set_xlabel("network evaluation")
    return Path(path)


def plot_similarity(
    similarity: Similarity, blocks: tuple[str, ...], path: Path | str, *, title: str = ""
) -> Path:
    """Cosine similarity of every block's outputs, evaluation against evaluation."""
    columns = 6 if len(blocks) > 12 else 3  # whole layers: SA, CA, FFN
    rows = -(-len(blocks) // columns)
    low = min(0.0, float(similarity.cosine.min()))
    with house_figure(
        path, columns=columns, rows=rows, width=1.7 * columns + 1.2, height=0.8 + 1.9 * rows
    ) as (figure, axes):
        figure.suptitle(title)
        for ax, name, matrix in zip(axes, blocks, similarity.cosine, strict=False):
            image = ax.imshow(matrix, vmin=low, vmax=1.0, cmap="viridis", interpolation="nearest")
            layer, kind = name.split(".")
            ax.set_title(f"layer {layer}, {kind}", fontsize=8)
            ax.tick_params(labelsize=6)
            ax.grid(False)
        for ax in axes[len(blocks) :]:
            ax.axis("off")
        figure.colorbar(image, ax=list(axes), shrink=0.6, label="cosine similarity")
    return Path(path)


def plot_latency(
    points: dict[str, list[tuple[float, float, int]]], path: Path | str, *, title: str = ""
) -> Path:
    """Error against median latency; a line joins the numbers of steps of one kind of sampler.

    Args:
        points: kind of sampler -> (milliseconds, rms error, K) of each.
        path: image file.
        title: over the figure.
    """
    markers = "osD^vP*X"
    with house_figure(path, columns=1, width=7.2, height=4.4) as (figure, (axis,)):
        figure.suptitle(title)
        for index, (name, values) in enumerate(points.items()):
            values = sorted(values)
            times, errors = [v[0] for v in values], [v[1] for v in values]
            axis.plot(times, errors, marker=markers[index % len(markers)], label=name, linewidth=1.0)
            for when, error, steps in zip(times, errors, (v[2] for v in values), strict=True):
                axis.annotate(f"K={steps}", (when, error), (3, 3), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1e-2)  # the reference itself has no error
        axis.set_ylim(bottom=0)
        axis.set_xlabel("milliseconds a chunk, median")
        axis.set_ylabel("rms error of the action, normalised")
        axis.legend(fontsize=8)
    return Path(path)
