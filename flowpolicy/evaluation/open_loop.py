"""Open-loop evaluation: the chunks that a policy predicts along recorded episodes, beside what was recorded.

It needs no simulator, and says less than a rollout: the policy never meets the consequences of its own
actions, and where a task can be done in several ways a good prediction may be far from the recorded one. It
is read against two predictions that anyone can make, holding the last action and the nearest neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flowpolicy.data.normalization import Normalizer
from flowpolicy.data.sampling import ChunkSampler, as_tensors
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import DataError
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval
from flowpolicy.features import Feature, Image
from flowpolicy.files.storage import write_table
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.progress import progress

POLICY, HOLD, NEAREST = "policy", "hold_last", "nearest_neighbour"
METHODS = {POLICY: "policy", HOLD: "hold the last action", NEAREST: "nearest neighbour"}
"""What predicts, and its name in words."""
WINDOWS = 2048
"""Held-out steps at which chunks are predicted, at most; they are evenly spaced."""
NEIGHBOURS = 20_000
"""Training steps among which the nearest neighbour is looked for, at most."""
SHOWN_STEPS = 1_000
"""Steps of the episode that is drawn, at most."""
_NEIGHBOUR_BYTES = 2e9  # of observations that are read for it
_BATCH = 64
_FEW_NUMBERS = 256  # of an observation that is no image: more are averaged down to so many
_THUMBNAIL = 8  # pixels of a side, of what is compared of an image


@dataclass(frozen=True)
class Trajectory:
    """One held-out episode and the chunks predicted along it, in physical units.

    Attributes:
        episode: its number.
        recorded: ``(steps, A)``.
        starts: ``(chunks,)`` step at which each chunk was predicted.
        predicted: ``(chunks, T, A)``.
        execute_horizon: T_e, after which the next chunk is predicted.
    """

    episode: int
    recorded: NDArray[np.float32]
    starts: NDArray[np.int64]
    predicted: NDArray[np.float32]
    execute_horizon: int


@dataclass(frozen=True)
class OpenLoopResult:
    """Errors of predicted chunks on held-out episodes, over steps inside the episodes alone.

    A normalised error is a physical one times ``inverse_scale``; dimensions that are constant in the training
    data have none, and do not count in means over dimensions.

    Attributes:
        names: ``(A,)`` of the dimensions.
        episodes: numbers of the held-out ones.
        windows: steps at which chunks were predicted.
        squares: method -> ``(episodes, T, A)`` sum of squared errors, physical units.
        counts: ``(episodes, T)`` errors in such a sum.
        inverse_scale: ``(A,)`` normalised per physical unit; 0 of a constant dimension.
        trajectory: what is drawn.
    """

    names: tuple[str, ...]
    episodes: tuple[int, ...]
    windows: int
    squares: dict[str, NDArray[np.float64]]
    counts: NDArray[np.int64]
    inverse_scale: NDArray[np.float64]
    trajectory: Trajectory

    def by_step_and_dimension(self, method: str = POLICY) -> NDArray[np.float64]:
        """Root mean square error ``(T, A)``, physical units; NaN beyond the longest episode."""
        with np.errstate(invalid="ignore"):
            return np.asarray(np.sqrt(self.squares[method].sum(0) / self.counts.sum(0)[:, None]))

    def by_dimension(self, method: str = POLICY) -> NDArray[np.float64]:
        """Root mean square error ``(A,)`` over the steps of the chunk, physical units."""
        return np.asarray(np.sqrt(self.squares[method].sum((0, 1)) / self.counts.sum()))

    def by_step(self, method: str = POLICY) -> NDArray[np.float64]:
        """Root mean square error ``(T,)`` over the dimensions, normalised units."""
        moving = self.inverse_scale > 0
        normalised = self.by_step_and_dimension(method)[:, moving] * self.inverse_scale[moving]
        return np.asarray(np.sqrt((normalised**2).mean(1)))

    def by_episode(self, method: str = POLICY) -> NDArray[np.float64]:
        """Root mean square error ``(episodes,)`` over chunks and dimensions, normalised units."""
        moving = self.inverse_scale > 0
        squares = self.squares[method][:, :, moving].sum(1) * self.inverse_scale[moving] ** 2
        return np.asarray(np.sqrt((squares / self.counts.sum(1, keepdims=True)).mean(1)))

    def error(self, method: str = POLICY) -> float:
        """Mean over the episodes of :meth:`by_episode`."""
        return float(self.by_episode(method).mean())

    def metrics(self) -> dict[str, Any]:
        """The summary's figures, under ``open_loop``; intervals are over episodes."""
        mine, found = self.by_episode(), {}
        for method in METHODS:
            row: dict[str, Any] = {
                "error": self.error(method),
                "error_ci95": list(mean_interval(self.by_episode(method))),
                "by_dimension": self.by_dimension(method).tolist(),
                "by_dimension_normalised": (self.by_dimension(method) * self.inverse_scale).tolist(),
                "by_step": self.by_step_and_dimension(method).tolist(),
                "by_step_normalised": self.by_step(method).tolist(),
            }
            if method != POLICY:
                difference = paired_difference_interval(mine, self.by_episode(method))
                row["policy_minus_this_ci95"] = list(difference)
            found[method] = row
        counts = {"episodes": len(self.episodes), "windows": self.windows}
        return {"open_loop": {**counts, "dimensions": list(self.names), **found}}

    def scalars(self) -> dict[str, float]:
        """What a training log takes: ``open_loop/error`` of the policy, and of the baselines beside it."""
        found = {"open_loop/error": self.error()}
        found |= {f"open_loop/{method}": self.error(method) for method in (HOLD, NEAREST)}
        errors = self.by_dimension() * self.inverse_scale
        return found | {
            f"open_loop/error/{name}": float(error) for name, error in zip(self.names, errors, strict=True)
        }

    def sentence(self) -> str:
        """The result in one line."""
        others = ", ".join(f"{self.error(method):.3g} of '{METHODS[method]}'" for method in (HOLD, NEAREST))
        low, high = mean_interval(self.by_episode())
        interval = "" if np.isnan(low) else f" [{low:.3g}, {high:.3g}]"
        count = f"{len(self.episodes)} held-out episode{'s' if len(self.episodes) > 1 else ''}"
        return (
            f"Open loop on {count}: action error {self.error():.3g}{interval}, against {others} (root mean "
            "square, normalised units)."
        )

    def write_csv(self, path: Path | str) -> Path:
        """One line for each method, step of the chunk and dimension: its error in both units."""
        errors = np.stack([self.by_step_and_dimension(method) for method in METHODS])
        method, step, dimension = np.indices(errors.shape).reshape(3, -1)
        columns = {
            "method": np.array(list(METHODS))[method],
            "step": step,
            "dimension": np.array(self.names)[dimension],
            "error": errors.reshape(-1),
            "error_normalised": (errors * self.inverse_scale).reshape(-1),
        }
        return write_table(columns, path)


def evaluate_open_loop(
    policy: FlowPolicy,
    demos: Demonstrations,
    held_out: Sequence[int],
    training: Sequence[int],
    *,
    learnt: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> OpenLoopResult:
    """Predict chunks along the held-out episodes, by the policy and by both baselines.

    All three predict at the same steps: every step of the held-out episodes but the first of each, before
    which there is no action to hold, evenly thinned to :data:`WINDOWS`. The nearest neighbour is the training
    step whose normalised observations, all T_o of them, are closest; each key counts alike, and images are
    compared as thumbnails. Its prediction is the chunk that was recorded there.

    Args:
        policy: normalisers fitted.
        demos: with the policy's observations.
        held_out: episodes to predict, which the policy was not trained on.
        training: episodes that it was trained on.
        learnt: the steps ``(steps,)`` that show what a policy should do; None: all. The others are neither
            predicted nor neighbours.
        seed: of the noise x_0.

    Raises:
        DataError: no held-out episode has two steps.
    """
    spec = policy.spec
    windows = ChunkSampler(
        as_tensors(demos, spec.features, "cpu"), as_tensors(demos, ["action"], "cpu")["action"],
        demos.episode_ends, spec.obs_horizon, spec.action_horizon,
    )  # fmt: skip
    starts, ends, usable = demos.episode_starts, demos.episode_ends, usable_episodes(demos, held_out, learnt)
    shown = np.ones(demos.num_steps, bool) if learnt is None else learnt
    steps = np.concatenate([np.arange(starts[e] + 1, ends[e]) for e in usable])
    steps = _thinned(steps[shown[steps]], WINDOWS)
    trained = np.concatenate([np.arange(starts[e], ends[e]) for e in training])
    neighbours = _Neighbours(policy, windows, trained[shown[trained]])
    ahead = np.arange(spec.action_horizon)
    owner = np.searchsorted(np.asarray([ends[e] for e in usable]), steps, side="right")
    shape = len(usable), *spec.chunk_shape
    squares, counts = {method: np.zeros(shape) for method in METHODS}, np.zeros(shape[:2], np.int64)
    generator = torch.Generator().manual_seed(seed)
    parts = np.array_split(np.arange(len(steps)), -(-len(steps) // _BATCH))
    for part in progress(parts, "predict held-out episodes"):
        batch = windows.batch(torch.from_numpy(steps[part]))
        last = windows.action[torch.from_numpy(steps[part] - 1)]
        predictions = {
            POLICY: policy.act(batch.observation, generator=generator).cpu(),
            HOLD: last[:, None].expand_as(batch.action),
            NEAREST: neighbours.chunks(batch.observation),
        }
        future = np.minimum(steps[part][:, None] + ahead, demos.num_steps - 1)
        mask = batch.mask.numpy() & shown[future]
        np.add.at(counts, owner[part], mask)
        for method, chunk in predictions.items():
            squared = (chunk.double() - batch.action.double()).numpy() ** 2
            np.add.at(squares[method], owner[part], squared * mask[:, :, None])
    # Of the actions as they are recorded, whatever form of them a policy learns.
    config = policy.config
    scale = Normalizer.fit(
        windows.action, config.action_normalization, max(1, config.action_clip), keep_all=True
    )
    seen = counts.sum(1) > 0  # of many short episodes, thinning may leave some out
    middle = sorted(usable, key=lambda e: ends[e] - starts[e])[len(usable) // 2]
    return OpenLoopResult(
        names=_names(demos),
        episodes=tuple(episode for episode, is_seen in zip(usable, seen, strict=True) if is_seen),
        windows=len(steps),
        squares={method: found[seen] for method, found in squares.items()},
        counts=counts[seen],
        inverse_scale=scale.inverse_scale.double().numpy(),
        trajectory=_trajectory(policy, windows, middle, int(starts[middle]), int(ends[middle]), seed),
    )


def usable_episodes(
    demos: Demonstrations, held_out: Sequence[int], learnt: NDArray[np.bool_] | None = None
) -> list[int]:
    """The held-out episodes that can be predicted: those of two steps or more, one of them, but for the
    first, ``learnt``.

    Raises:
        DataError: there is none.
    """
    shown = np.ones(demos.num_steps, bool) if learnt is None else learnt
    starts, ends = demos.episode_starts, demos.episode_ends
    usable = [episode for episode in sorted(held_out) if shown[starts[episode] + 1 : ends[episode]].any()]
    if not usable:
        raise DataError(
            f"{demos.source} has no held-out episode of two steps or more to be evaluated on; raise "
            "data.validation_fraction, or record more."
        )
    return usable


class _Neighbours:
    """Training steps by what a policy observes at them."""

    def __init__(self, policy: FlowPolicy, windows: ChunkSampler, steps: NDArray[np.int64]) -> None:
        self.policy, self.windows = policy, windows
        observation = windows.batch(torch.zeros(1, dtype=torch.int64)).observation
        bytes_of_one = sum(values.nbytes for values in observation.values())
        most = int(min(NEIGHBOURS, max(1_000, _NEIGHBOUR_BYTES / bytes_of_one)))
        self.steps = torch.from_numpy(_thinned(steps, most))
        parts = progress(torch.split(self.steps, _BATCH), "read training observations")
        self.points = torch.cat([self._points(windows.batch(part).observation) for part in parts])

    def chunks(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The recorded chunks ``(B, T, A)`` at the steps whose observations are nearest to these."""
        nearest = torch.cdist(self._points(observation), self.points).argmin(1)
        return self.windows.batch(self.steps[nearest]).action

    def _points(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Physical observations ``(B, T_o, *shape)`` as points ``(B, n)`` that can be compared."""
        features, device = self.policy.spec.features, self.policy.device
        with torch.no_grad():
            normalized = self.policy.normalize({key: v.to(device) for key, v in observation.items()})
            points = [_point(features[key], values) for key, values in normalized.items()]
        return torch.cat([values / values.shape[1] ** 0.5 for values in points], dim=1).cpu()


def _point(feature: Feature, values: Tensor) -> Tensor:
    """Normalised ``(B, T_o, *shape)`` to numbers ``(B, n)`` of about one size; what is large, made small."""
    steps = values.flatten(0, 1)
    if isinstance(feature, Image):
        pixels = feature.pixels(steps).float().movedim(-1, 1) / 127.5 - 1
        steps = functional.adaptive_avg_pool2d(pixels, _THUMBNAIL)
    elif math.prod(feature.shape) > _FEW_NUMBERS:
        steps = functional.adaptive_avg_pool1d(steps.flatten(1)[:, None], _FEW_NUMBERS)
    return steps.reshape(len(values), -1)


def _thinned(steps: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of them, evenly spaced."""
    if len(steps) <= most:
        return steps
    return steps[np.linspace(0, len(steps) - 1, most).round().astype(np.int64)]


def _trajectory(
    policy: FlowPolicy, windows: ChunkSampler, episode: int, start: int, end: int, seed: int
) -> Trajectory:
    """Chunks along one episode, each where the one before has been executed."""
    end = min(end, start + SHOWN_STEPS)
    every = policy.spec.execute_horizon
    steps = torch.arange(start, end, every)
    generator = torch.Generator().manual_seed(seed)
    chunks = [
        policy.act(windows.batch(part).observation, generator=generator).cpu()
        for part in torch.split(steps, _BATCH)
    ]
    recorded = windows.action[start:end].numpy()
    return Trajectory(episode, recorded, (steps - start).numpy(), torch.cat(chunks).numpy(), every)


def _names(demos: Demonstrations) -> tuple[str, ...]:
    """Of the action's dimensions: as the recording calls them, or numbers."""
    count = demos.arrays["action"].shape[1]
    declared = demos.attributes.get("dimension_names")
    named = declared.get("action") if isinstance(declared, Mapping) else None
    if isinstance(named, list) and len(named) == count and len({str(name) for name in named}) == count:
        return tuple(str(name)[:100] for name in named)
    return tuple(str(number) for number in range(count))
