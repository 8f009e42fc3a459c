"""From demonstrations, of one store or several, to fitted normalisers and samplers of chunks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy.data.command_source import learnt_steps
from flowpolicy.data.mixture import datasets, present
from flowpolicy.data.sampling import ChunkSampler, as_tensors
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.weighting import MixtureSampler
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.features import Feature
from flowpolicy.features.presence import presence_key
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.action_space import ActionConfig, action_config
from flowpolicy.pretraining.config import DataConfig

logger = logging.getLogger(__name__)
Transform = Callable[[Tensor, Tensor], Tensor]
MOST_ROWS = 1 << 21
"""Of relative actions, that statistics are taken over."""
BLOCK = 4096


def observed_features(demos: Demonstrations, keys: Iterable[str]) -> dict[str, Feature]:
    """The features of ``keys``, with a presence after each that not every store has."""
    names = [name for key in keys for name in (key, presence_key(key)) if name == key or name in demos.arrays]
    return {key: demos.feature(key) for key in dict.fromkeys(names)}


def fit(
    policy: FlowPolicy, demos: Demonstrations, episodes: range | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Fit the normalisers to some episodes, None being all; returns the observations, key by key where they
    were recorded, and the actions ``(rows, A')`` that they were fitted to.
    """
    arrays = as_tensors(demos, [*policy.observation_normalizers, "action"], "cpu")
    chosen = range(demos.num_episodes) if episodes is None else episodes
    starts = demos.episode_starts
    inside = np.zeros(demos.num_steps, bool)
    inside[starts[chosen[0]] : demos.episode_ends[chosen[-1]]] = True
    observation = {}
    for key in policy.observation_normalizers:
        recorded = np.zeros(demos.num_steps, bool)
        recorded[present(demos, key)] = True
        rows = recorded & inside
        rows = rows if rows.any() else recorded
        observation[key] = arrays[key] if rows.all() else arrays[key][torch.from_numpy(rows)]
    action = learnt_actions(policy, demos, chosen)
    policy.fit_normalizers(observation, action)
    return observation, action


def learnt_space(
    data: DataConfig, features: Mapping[str, Feature], action_dim: int, start: FlowPolicy | None
) -> ActionConfig:
    """How actions are learnt: as the settings say, or where they say nothing as ``start`` does."""
    says_nothing = data.action_space is None and data.action_state is None and data.rotations is None
    if start is not None and says_nothing:
        return start.config.actions
    return action_config(data.action_space, data.action_state, data.rotations, features, action_dim)


def learnt_actions(policy: FlowPolicy, demos: Demonstrations, episodes: Iterable[int]) -> Tensor:
    """Actions of these episodes as the network learns them ``(rows, A')``, in physical units.

    Relative actions depend on where a chunk begins: they are those of all chunks, or of some of them and the
    extremes of all.
    """
    space = policy.action_space
    inner, base = _unrolled(policy, demos, "cpu")
    if base is None:
        starts, ends = demos.episode_starts, demos.episode_ends
        return torch.cat([inner[starts[i] : ends[i]] for i in episodes])
    horizon = policy.spec.action_horizon
    chunks = ChunkSampler(
        {}, inner, demos.episode_ends, 1, horizon, episodes,
        transform=lambda actions, step: space.moved(actions, base[step]),
    )  # fmt: skip
    stride = max(1, -(-len(chunks) * horizon // MOST_ROWS))
    rows, extremes = [], []
    for first in range(0, len(chunks), BLOCK):
        batch = chunks.batch(torch.arange(first, min(first + BLOCK, len(chunks))))
        every = batch.action[batch.mask]
        rows.append(every[::stride])
        extremes.append(torch.stack([every.amin(0), every.amax(0)]))
    if stride > 1:
        rows.append(torch.stack([torch.cat(extremes).amin(0), torch.cat(extremes).amax(0)]))
    return torch.cat(rows)


def _unrolled(policy: FlowPolicy, demos: Demonstrations, device: Any) -> tuple[Tensor, Tensor | None]:
    """Actions ``(steps, A')`` that nothing is subtracted from yet, and what will be."""
    space = policy.action_space
    for key in space.state_keys:
        if presence_key(key) in policy.spec.features:
            raise DataError(
                f"Not every store has '{key}', which data.action_state subtracts; leave out those without it."
            )
    actions = as_tensors(demos, ["action"], device)["action"]
    state = as_tensors(demos, {key: policy.spec.features[key] for key in space.state_keys}, device)
    return space.unrolled(actions), space.base(state)


def normalized(
    policy: FlowPolicy, demos: Demonstrations, normalizers: str | None
) -> tuple[dict[str, Tensor], Tensor, Transform | None]:
    """Observations and actions by the policy's normalisers, or each store's by its own. Where a state is
    subtracted from actions, they are as they are, with what makes the normalised ones of a window's.
    """
    observation = as_tensors(demos, policy.spec.features, policy.device)
    action, base = _unrolled(policy, demos, policy.device)
    if base is not None:
        if normalizers == "each":
            raise ConfigError(
                "data.normalizers=each takes absolute actions; leave out data.action_space, or take "
                "data.normalizers=shared."
            )
        normalize = policy.action_normalizer.frozen()

        def transform(actions: Tensor, step: Tensor) -> Tensor:
            return normalize(policy.action_space.moved(actions, base[step]))

        return policy.normalize(observation), action, transform
    if normalizers != "each" or not datasets(demos):
        return policy.normalize(observation), policy.action_normalizer.normalize(action), None
    ends, parts = [0, *demos.episode_ends.tolist()], []
    for name, own in policies_of_stores(policy, demos).items():
        episodes = datasets(demos)[name]
        rows = slice(ends[episodes.start], ends[episodes.stop])
        there = own.normalize({key: values[rows] for key, values in observation.items()})
        parts.append((there, own.action_normalizer.normalize(action[rows])))
    for key in policy.observation_normalizers:
        observation[key] = torch.cat([there[key] for there, _ in parts])
    return observation, torch.cat([part for _, part in parts]), None


def policies_of_stores(policy: FlowPolicy, demos: Demonstrations) -> dict[str, FlowPolicy]:
    """Copies of a policy, each with normalisers of one of several stores."""
    found = {}
    for name, episodes in datasets(demos).items():
        found[name] = copy.deepcopy(policy)
        fit(found[name], demos, episodes)
    return found


def make_samplers(
    policy: FlowPolicy, demos: Demonstrations, data: DataConfig, seed: int
) -> tuple[ChunkSampler, ChunkSampler | None]:
    """Normalised training and held-out chunks on the policy's device; the episodes are split by the seed."""
    observation, action, transform = normalized(policy, demos, data.normalizers)
    train_episodes, held_out = split_episodes(demos, data, seed)
    horizons = policy.spec.obs_horizon, policy.spec.action_horizon
    parts = datasets(demos)
    learnt = learnt_steps(demos.arrays, data.only_source, demos.source)
    if learnt is not None:  # an episode without a correction has nothing to validate on
        starts, ends = demos.episode_starts, demos.episode_ends
        held_out = [episode for episode in held_out if learnt[starts[episode] : ends[episode]].any()]

    def sampler(episodes: list[int], weights: tuple[float, ...] | None) -> ChunkSampler:
        given = (observation, action, demos.episode_ends, *horizons)
        if not parts:
            return ChunkSampler(*given, sorted(episodes), learnt, transform=transform)
        return MixtureSampler(
            *given, episodes, parts=parts, weights=weights, learnt=learnt, transform=transform
        )

    training = sampler(train_episodes, data.weights)
    missing = [name for name in parts if name not in training.parts]
    if missing:
        raise DataError(
            f"No step of '{missing[0]}' is left to train on; leave it out, hold out fewer episodes, or "
            "change data.only_source."
        )
    return training, sampler(held_out, None) if held_out else None


def split_episodes(demos: Demonstrations, data: DataConfig, seed: int) -> tuple[list[int], list[int]]:
    """Which episodes are trained on and which are held out: the store's mask says so, or the seed.

    Of several stores, each is split by itself.

    Raises:
        DataError: a mask that the store does not have.
    """
    rng = np.random.default_rng(seed)
    masks = demos.masks
    if data.validation_mask is not None and data.validation_mask not in masks:
        raise DataError(
            f"{demos.source} has no mask '{data.validation_mask}' (it has "
            f"{', '.join(sorted(masks)) or 'none'}); choose another data.validation_mask, or null."
        )
    training: list[int] = []
    held_out: list[int] = []
    for episodes in datasets(demos).values() or (range(demos.num_episodes),):
        order = (episodes.start + rng.permutation(len(episodes))).tolist()
        if data.validation_mask is not None:
            held = [number for number in order if number in masks[data.validation_mask]]
            order = [number for number in order if number not in held]
        else:
            count = round(data.validation_fraction * len(order))
            if data.validation_fraction > 0 and len(order) > 1:
                count = max(1, count)
            held, order = order[:count], order[count:]
        held_out += held
        training += order[: data.max_episodes]
    return training, held_out


def describe(demos: Demonstrations, training: ChunkSampler) -> dict[str, Any]:
    """What each of several stores has, and its share of the samples, by name; empty where there is one."""
    if not isinstance(training, MixtureSampler):
        return {}
    lengths = demos.episode_lengths
    return {
        name: {
            "path": demos.parts[name][0],
            "episodes": len(episodes),
            "steps": int(lengths[episodes.start : episodes.stop].sum()),
            "share": training.shares[name],
        }
        for name, episodes in datasets(demos).items()
    }


def report(mixture: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what a mixture is made of."""
    for name, about in mixture.items():
        logger.info(
            "%5.1f%% of the samples from %s: %d episodes, %s steps of %s",
            100 * about["share"], name, about["episodes"], f"{about['steps']:,}", about["path"],
        )  # fmt: skip
