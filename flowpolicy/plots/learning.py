"""Curves of training and of practice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.statistics import seeds_interval
from flowpolicy.plots.figure import BLUE, GREEN, GREY, KEYS, LABELS, ORANGE, house_figure


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
            (f"Evaluation {LABELS[metric]}", (evaluation,)),
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
                low, high = np.transpose([seeds_interval(column) for column in values.T])
                label_of_band = "95% interval of the mean (t)"
                axis.fill_between(steps, low, high, color=BLUE, alpha=0.15, lw=0, label=label_of_band)
            axis.axhline(bases[label], color=GREY, ls="--", lw=1.4, label=f"pretrained, {bases[label]:.4g}")
            axis.set_ylim(bottom=0)
            axis.set_title(f"{label}: {LABELS[metric]} as deployed")
            axis.set_xlabel("environment steps")
            axis.legend(loc="lower right")
    return Path(path)


def _practice_panel(
    axis: Any,
    rows: Sequence[Mapping[str, float]],
    name: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
) -> None:
    axis.plot(*_series(rows, f"rollout/{name}"), color=BLUE, label="practising, with noise")
    mean_key, _ = KEYS[name]
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
    axis.set_title(LABELS[name].capitalize())
    axis.set_ylim(bottom=0 if name == "success" else None)
    axis.legend()


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
