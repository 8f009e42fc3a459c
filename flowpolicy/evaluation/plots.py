"""The package's figures: learning curves, the number of integration steps, returns against demonstrations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flowpolicy.errors import ConfigError
from flowpolicy.storage import atomic_file

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F6368"

_STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E6EA",
    "grid.linewidth": 0.8,
    "axes.edgecolor": GREY,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}
_LABELS = {"return": "return", "success": "success rate", "score": "score"}
_KEYS = {
    "return": ("return_mean", "return_ci95"),
    "success": ("success_rate", "success_ci95"),
    "score": ("score_mean", "score_ci95"),
}


def plot_learning_curves(
    rows: Sequence[Mapping[str, float]],
    path: Path | str,
    *,
    title: str = "",
    metric: str = "return",
    demo_mean: float | None = None,
) -> Path:
    """Draw a training run; panels without numbers are left out.

    Args:
        rows: of ``metrics.csv``: ``step`` and any of ``loss/total``, ``validation/loss``,
            ``validation/action_error``, ``evaluation/<metric>`` with ``_low`` and ``_high`` (its interval).
        path: image file; the suffix chooses the format.
        title: over the figure.
        metric: which of return, success and score the evaluation panel shows.
        demo_mean: the demonstrations' mean of it, a dashed line.

    Raises:
        ConfigError: when no row holds anything to draw.
    """
    evaluation = f"evaluation/{metric}"
    panels = [
        (name, keys)
        for name, keys in (
            ("Loss", ("loss/total", "validation/loss")),
            ("Open-loop action error", ("validation/action_error",)),
            (f"Evaluation {_LABELS[metric]}", (evaluation,)),
        )
        if any(key in row for row in rows for key in keys)
    ]
    if not panels:
        raise ConfigError(
            f"There is nothing to draw in {path}: no losses, errors or evaluations were logged."
        )
    with house_figure(path, columns=len(panels), width=4.6 * len(panels), height=3.4) as (figure, axes):
        for axis, (name, keys) in zip(axes, panels, strict=True):
            axis.set_title(name)
            axis.set_xlabel("optimiser steps")
            axis.locator_params(axis="x", nbins=6)
            for key, colour, label in zip(
                keys, (BLUE, ORANGE), ("training", "held-out episodes"), strict=False
            ):
                steps, values = _series(rows, key)
                if steps.size:
                    axis.plot(
                        steps,
                        values,
                        color=colour,
                        label=label,
                        marker="o" if steps.size < 15 else None,
                        ms=4,
                    )
            if name == "Loss":
                axis.set_yscale("log")
                axis.legend()
            elif name.startswith("Open"):
                axis.set_ylabel("RMS error, normalised units")
                axis.set_ylim(bottom=0)
            else:
                _evaluation_panel(axis, rows, evaluation, demo_mean)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return Path(path)


def plot_practice(
    rows: Sequence[Mapping[str, float]],
    path: Path | str,
    *,
    title: str = "",
    metric: str = "return",
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> Path:
    """Draw a fine-tuning run: how well it does while it practises, how far and how noisily it moves.

    Args:
        rows: of ``metrics.csv``: ``step`` in environment steps, and metrics of ``rollout/``, ``evaluation/``
            and ``train/``.
        path: image file; the suffix chooses the format.
        title: over the figure.
        metric: ``success`` puts the success rate before the return.
        before: ``EvaluationResult.metrics()`` of the pretrained policy.
        after: of the tuned one.
    """
    shown = ("success", "return") if metric == "success" else ("return",)
    with house_figure(path, columns=len(shown) + 2, width=4.6 * (len(shown) + 2), height=3.4) as (
        figure,
        axes,
    ):
        for axis, name in zip(axes, shown, strict=False):
            _practice_panel(axis, rows, name, before, after)
        distance, noise = axes[-2:]
        for key, colour, label in (
            ("train/kl_last", BLUE, "KL of an iteration, nats a chunk"),
            ("train/clip_fraction", ORANGE, "share of clipped ratios"),
        ):
            distance.plot(*_series(rows, key), color=colour, label=label, lw=1.2)
        distance.set_title("How far an iteration moves")
        distance.set_ylim(bottom=0)
        distance.legend()
        noise.plot(*_series(rows, "train/noise_std"), color=GREEN, label="noise, normalised units", lw=1.2)
        noise.plot(
            *_series(rows, "train/explained_variance"),
            color=GREY,
            label="critic's explained variance",
            lw=1.2,
        )
        noise.set_ylim(0, 1.05)
        noise.set_title("Noise and critic")
        noise.legend()
        for axis in axes:
            axis.set_xlabel("environment steps")
            axis.locator_params(axis="x", nbins=5)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return Path(path)


def plot_practice_bands(
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    path: Path | str,
    *,
    bases: Mapping[str, float],
    metric: str = "return",
) -> Path:
    """Draw learning curves of several runs, a panel each: every seed, their mean, and its 95% band.

    Args:
        curves: label -> one mapping per seed with ``step`` and ``evaluation/<metric>``.
        path: image file; the suffix chooses the format.
        bases: label -> the pretrained policy's figure.
        metric: return or success.
    """
    with house_figure(path, columns=len(curves), width=5.2 * len(curves), height=3.6) as (_, axes):
        for axis, (label, seeds) in zip(axes, curves.items(), strict=True):
            for seed in seeds:
                axis.plot(seed["step"], seed[f"evaluation/{metric}"], color=BLUE, lw=0.8, alpha=0.5)
            label_of_mean = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
            shortest = min(len(seed["step"]) for seed in seeds)
            steps = np.mean([seed["step"][:shortest] for seed in seeds], axis=0)
            values = np.array([seed[f"evaluation/{metric}"][:shortest] for seed in seeds])
            axis.plot(steps, values.mean(axis=0), color=BLUE, label=label_of_mean)
            if len(seeds) > 2:
                half = _T95[len(seeds)] * values.std(axis=0, ddof=1) / np.sqrt(len(seeds))
                axis.fill_between(
                    steps, values.mean(axis=0) - half, values.mean(axis=0) + half, color=BLUE, alpha=0.15,
                    lw=0, label="95% interval of the mean (t)",
                )  # fmt: skip
            axis.axhline(bases[label], color=GREY, ls="--", lw=1.4, label=f"pretrained, {bases[label]:.4g}")
            axis.set_ylim(bottom=0)
            axis.set_title(f"{label}: {_LABELS[metric]} as deployed")
            axis.set_xlabel("environment steps")
            axis.legend(loc="lower right")
    return Path(path)


_T95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5% points of Student's t with n - 1 degrees of freedom."""


def _practice_panel(
    axis: Any,
    rows: Sequence[Mapping[str, float]],
    name: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
) -> None:
    axis.plot(*_series(rows, f"rollout/{name}"), color=BLUE, label="practising, with noise")
    mean_key, _ = _KEYS[name]
    if before is not None and before[mean_key] is not None:
        axis.axhline(
            before[mean_key], color=GREY, ls="--", lw=1.4, label=f"pretrained, {before[mean_key]:.4g}"
        )
    points = [row for row in rows if f"evaluation/{name}" in row]
    steps = np.array([row["step"] for row in points])
    means = np.array([row[f"evaluation/{name}"] for row in points])
    if steps.size:
        ends = np.array([[row[f"evaluation/{name}_{side}"] for row in points] for side in ("low", "high")])
        label = "as deployed, 95% interval"
        if after is not None:
            label = f"as deployed, {after[mean_key]:.4g} at the end"
        spans = np.nan_to_num(np.abs(ends - means))
        axis.errorbar(
            steps, means, yerr=spans, color=ORANGE, marker="o", ms=4, capsize=3, lw=1.4, label=label
        )
    axis.set_title(_LABELS[name].capitalize())
    axis.set_ylim(bottom=0 if name == "success" else None)
    axis.legend()


def plot_k_sweep(
    sweep: Sequence[Mapping[str, Any]],
    path: Path | str,
    *,
    title: str = "",
    metric: str = "return",
    demo_mean: float | None = None,
) -> Path:
    """Draw a metric and the cost of a chunk against the number of integration steps K.

    Args:
        sweep: one mapping per K: ``num_steps`` and the entries of ``EvaluationResult.metrics()``.
        path: image file; the suffix chooses the format.
        title: over the figure.
        metric: return, success or score.
        demo_mean: the demonstrations' mean of it, a dashed line.
    """
    mean_key, interval_key = _KEYS[metric]
    ordered = sorted(sweep, key=lambda row: int(row["num_steps"]))
    steps = np.array([row["num_steps"] for row in ordered], dtype=float)
    means = np.array([row[mean_key] for row in ordered], dtype=float)
    intervals = np.array([row[interval_key] for row in ordered], dtype=float)
    cost = np.array([row["ms_per_chunk"] for row in ordered], dtype=float)
    counts = sorted({int(row["episodes"]) for row in ordered})
    with house_figure(path, columns=2, width=9.2, height=3.6) as (figure, (left, right)):
        spans = np.nan_to_num(np.abs(intervals - means[:, None]).T)
        left.errorbar(steps, means, yerr=spans, color=BLUE, marker="o", ms=5, capsize=4, elinewidth=1.4)
        if demo_mean is not None:
            left.axhline(demo_mean, color=GREY, ls="--", lw=1.4, label=f"demonstrations, {demo_mean:.4g}")
            left.legend()
        left.set_ylim(bottom=0 if metric != "return" or means.min() > 0 else None)
        episodes = " to ".join(str(count) for count in {counts[0]: 0, counts[-1]: 0})
        left.set_title(f"{_LABELS[metric].capitalize()}, mean and 95% interval, n = {episodes}")
        left.set_ylabel(_LABELS[metric])
        right.plot(steps, cost, color=ORANGE, marker="s", ms=5)
        right.set_title("Planning one chunk alone, median")
        right.set_ylabel("milliseconds")
        right.set_ylim(bottom=0)
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(steps, [f"{step:g}" for step in steps])
            axis.minorticks_off()
            axis.set_xlabel("integration steps K")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return Path(path)


def plot_returns(
    returns: ArrayLike,
    path: Path | str,
    *,
    demo_returns: ArrayLike | None = None,
    demo_mean: float | None = None,
    interval: Sequence[float] | None = None,
    title: str = "",
    label: str = "return",
) -> Path:
    """Draw the histogram of a policy's returns over those of the demonstrations.

    Args:
        returns: (n,) one number per episode.
        path: image file; the suffix chooses the format.
        demo_returns: (m,) the demonstrations', as a second histogram (both are scaled to area 1).
        demo_mean: their mean, a dashed line; taken from ``demo_returns`` where those are given.
        interval: 95% interval of the policy's mean, shaded.
        title: over the figure.
        label: what the numbers are.
    """
    ours = np.asarray(returns, dtype=float)
    theirs = None if demo_returns is None else np.asarray(demo_returns, dtype=float)
    pooled = ours if theirs is None else np.concatenate([ours, theirs])
    edges = np.linspace(pooled.min(), pooled.max() + 1e-9 + 1e-6 * abs(pooled.max()), 31)
    with house_figure(path, columns=1, width=6.4, height=3.6) as (_, (axis,)):
        share = {"bins": edges, "density": True}
        if theirs is not None:
            name = f"demonstrations, n = {theirs.size}, mean {theirs.mean():.4g}"
            axis.hist(theirs, color=GREY, alpha=0.35, label=name, **share)
            demo_mean = float(theirs.mean())
            axis.axvline(demo_mean, color=GREY, ls="--", lw=1.4, ymax=0.78)
        elif demo_mean is not None:
            axis.axvline(
                demo_mean, color=GREY, ls="--", lw=1.4, label=f"demonstrations, mean {demo_mean:.4g}"
            )
        name = f"policy, n = {ours.size}, mean {ours.mean():.4g}"
        if interval is not None and np.isfinite(interval).all():
            name += f" [{interval[0]:.4g}, {interval[1]:.4g}]"
            axis.axvspan(interval[0], interval[1], ymax=0.78, color=BLUE, alpha=0.18, lw=0)
        axis.hist(ours, color=BLUE, histtype="stepfilled", alpha=0.55, label=name, **share)
        axis.axvline(ours.mean(), color=BLUE, lw=1.6, ymax=0.78)
        axis.set_xlabel(f"{label} of an episode")
        axis.set_ylabel("density of episodes")
        axis.set_title(title or f"Episode {label}, mean with 95% interval")
        top = axis.get_ylim()[1]
        axis.set_ylim(0, 1.28 * top)  # room for the legend above the bars
        axis.legend(loc="upper left")
    return Path(path)


def plot_tasks(by_task: Mapping[str, Mapping[str, Any]], path: Path | str, *, title: str = "") -> Path:
    """Draw the success rate of each of several tasks, with its 95% interval (Wilson).

    Args:
        by_task: ``EvaluationResult.metrics()["by_task"]``, of tasks with a success rate.
        path: image file; the suffix chooses the format.
        title: over the figure.
    """
    names = list(by_task)
    rates = np.array([by_task[name]["success_rate"] for name in names])
    ends = np.array([by_task[name]["success_ci95"] for name in names])
    places = np.arange(len(names))
    height = 1.3 + 0.34 * len(names)
    with house_figure(path, columns=1, width=6.4, height=height) as (_, (axis,)):
        axis.barh(places, rates, color=BLUE, alpha=0.55, height=0.6)
        spans = np.abs(ends - rates[:, None]).T
        axis.errorbar(rates, places, xerr=spans, fmt="none", ecolor=BLUE, capsize=3, elinewidth=1.4)
        axis.axvline(rates.mean(), color=ORANGE, lw=1.4, label=f"mean of the tasks, {rates.mean():.2f}")
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("success rate, 95% interval")
        axis.set_title(title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return Path(path)


def _evaluation_panel(
    axis: Any, rows: Sequence[Mapping[str, float]], key: str, demo_mean: float | None
) -> None:
    steps, _ = _series(rows, key)
    (with_low, low), (with_high, high) = _series(rows, f"{key}_low"), _series(rows, f"{key}_high")
    if steps.size and np.array_equal(with_low, steps) and np.array_equal(with_high, steps):
        axis.fill_between(steps, low, high, color=BLUE, alpha=0.2, lw=0)
        axis.lines[-1].set_label("policy, 95% interval")
    else:
        axis.lines[-1].set_label("policy")
    if demo_mean is not None:
        axis.axhline(demo_mean, color=GREY, ls="--", lw=1.4, label=f"demonstrations, {demo_mean:.4g}")
    _, episodes = _series(rows, "evaluation/episodes")
    if episodes.size:
        axis.set_title(f"{axis.get_title(loc='left')}, n = {episodes[-1]:g}")
    axis.legend()


def _series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[Any, Any]:
    found = [(row["step"], row[key]) for row in rows if key in row and np.isfinite(row[key])]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


@contextlib.contextmanager
def house_figure(
    path: Path | str, *, columns: int, width: float, height: float, rows: int = 1
) -> Iterator[tuple[Any, Any]]:
    """Yield (figure, axes, row by row) in the house style and save it; no global state is touched."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "Plots need matplotlib; install it with: pip install 'flowpolicy[train]'."
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        yield figure, axes
        with atomic_file(path) as temporary:
            figure.savefig(temporary)
