"""Schedules, similarities, and the error of samplers against their latency."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.acceleration.caching.similarity import Similarity
from flowpolicy.plots.figure import BLUE, house_figure, plain_log_ticks


def plot_schedules(schedules: dict[str, Schedule], path: Path | str, *, title: str = "") -> Path:
    """Blocks against evaluations, a panel a schedule; what is recomputed is dark."""
    from matplotlib.colors import ListedColormap

    some = next(iter(schedules.values()))
    blocks, size = some.key.blocks, some.key.num_evaluations
    rows, total = len(schedules), 0.6 + (0.5 + 0.11 * len(blocks)) * len(schedules)
    with house_figure(path, columns=1, rows=rows, width=8.0, height=total, title=title) as (_, axes):
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
    low, size = min(0.0, float(similarity.cosine.min())), (1.7 * columns + 1.2, 0.8 + 1.9 * rows)
    with house_figure(
        path, columns=columns, rows=rows, width=size[0], height=size[1], title=title, small=True
    ) as (figure, axes):
        for ax, name, matrix in zip(axes, blocks, similarity.cosine, strict=False):
            image = ax.imshow(matrix, vmin=low, vmax=1.0, cmap="viridis", interpolation="nearest")
            ax.set_title("layer {}, {}".format(*name.split(".")))
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
    with house_figure(path, columns=1, width=7.2, height=4.4, title=title) as (_, (axis,)):
        for index, (name, values) in enumerate(points.items()):
            times, errors, steps = zip(*sorted(values), strict=True)
            axis.plot(times, errors, marker=markers[index % len(markers)], label=name, lw=1.0)
            for when, error, count in zip(times, errors, steps, strict=True):
                axis.annotate(f"K={count}", (when, error), (3, 3), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1e-2)  # the reference itself has no error
        axis.set_ylim(bottom=0)
        plain_log_ticks(axis)
        axis.set(xlabel="milliseconds a chunk, median", ylabel="rms error of the action, normalised")
        axis.legend(fontsize=8)
    return Path(path)
