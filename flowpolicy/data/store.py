"""Demonstrations on disk: a zarr group in the layout of Diffusion Policy's replay buffer.

``data/<key>`` holds one row per step, all episodes one after another; ``meta/episode_ends`` holds the
index just past each episode's last step. Optional ``data/reward``, ``data/terminated`` and
``data/truncated``; attributes say where the data come from. A store is a folder, or a zip of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.keys import TASK_INDEX, check_key, chosen_keys, listed
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.data.store_writing import store_writer
from flowpolicy.data.task_texts import TaskTexts, is_task_text
from flowpolicy.data.zarr_reading import open_store, resolve_path
from flowpolicy.errors import DataError
from flowpolicy.features import Feature, TextFeature
from flowpolicy.features.stored import stored_feature
from flowpolicy.runs.progress import progress

_BLOCK_BYTES = 1 << 24


@dataclass
class Demonstrations:
    """Episodes in memory.

    Attributes:
        arrays: key -> ``(steps, ...)``; always holds ``action`` ``(steps, A)``.
        episode_ends: ``(episodes,)`` int64, strictly increasing, the last equal to ``steps``.
        attributes: where the data come from (env_id, fps, source, licence, recipe, ...).
        source: the file they were read from, for messages.
        parts: name -> path and episodes of each store, where they come from several.
    """

    arrays: dict[str, NDArray[Any]]
    episode_ends: NDArray[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    source: str = "demonstrations"
    parts: dict[str, tuple[str, range]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.episode_ends = np.asarray(self.episode_ends)
        validate(self)
        self.episode_ends = self.episode_ends.astype(np.int64)

    @property
    def num_steps(self) -> int:
        """Steps over all episodes."""
        return int(self.episode_ends[-1])

    @property
    def num_episodes(self) -> int:
        """Episodes."""
        return len(self.episode_ends)

    @property
    def episode_starts(self) -> NDArray[Any]:
        """Index of each episode's first step, ``(episodes,)``."""
        return np.concatenate([[0], self.episode_ends[:-1]])

    @property
    def episode_lengths(self) -> NDArray[Any]:
        """Steps of each episode, ``(episodes,)``."""
        return np.diff(self.episode_ends, prepend=0)

    @property
    def episode_returns(self) -> NDArray[Any] | None:
        """Undiscounted sum of rewards of each episode, ``(episodes,)``; None without rewards."""
        if "reward" not in self.arrays:
            return None
        rewards = self.arrays["reward"].reshape(self.num_steps).astype(np.float64)
        return np.add.reduceat(rewards, self.episode_starts)

    def feature(self, key: str) -> Feature:
        """What ``key`` holds, as it is declared or else as it looks; ``task`` are the words of the attribute
        ``tasks`` where no array is called so."""
        if is_task_text(key, self.arrays):
            return self._task_texts().feature()
        array = self._array(key)
        return stored_feature(key, array.dtype, array.shape[1:], self.attributes, self.source)

    def values(self, key: str, feature: Feature) -> NDArray[Any]:
        """What a policy with this feature is given of ``key``, ``(steps, *shape)``.

        Raises:
            DataError: there is no such key.
        """
        if is_task_text(key, self.arrays) and isinstance(feature, TextFeature):
            return self._task_texts().values(feature)
        return feature.array(self._array(key))

    def _array(self, key: str) -> NDArray[Any]:
        if key not in self.arrays:
            raise DataError(
                f"{self.source} has no observation key '{key}'; it has {', '.join(sorted(self.arrays))}."
            )
        return self.arrays[key]

    def _task_texts(self) -> TaskTexts:
        return TaskTexts(self.attributes, self.arrays[TASK_INDEX], self.source)

    @property
    def masks(self) -> dict[str, list[int]]:
        """Named sets of episodes, by number: the attribute ``masks``, as robomimic's ``mask/train``.

        Raises:
            DataError: an episode that is not there, or something else than numbers.
        """
        found = self.attributes.get("masks") or {}
        valid = isinstance(found, Mapping) and all(
            isinstance(numbers, list)
            and all(isinstance(number, int) and 0 <= number < self.num_episodes for number in numbers)
            for numbers in found.values()
        )
        if not valid:
            raise DataError(
                f"{self.source}: attribute 'masks' must list episodes from 0 to {self.num_episodes - 1} by "
                "name; repair or remove it."
            )
        return {str(name): list(numbers) for name, numbers in found.items()}

    def select_episodes(self, episodes: Iterable[int]) -> Demonstrations:
        """A copy with only the given episodes, in the given order."""
        chosen = list(episodes)
        if not chosen:
            raise DataError(f"No episode of {self.source} is selected; at least one is needed.")
        starts, ends = self.episode_starts, self.episode_ends
        rows = np.concatenate([np.arange(starts[i], ends[i]) for i in chosen])
        attributes = dict(self.attributes)
        if self.masks:
            attributes["masks"] = {
                name: [place for place, number in enumerate(chosen) if number in members]
                for name, members in self.masks.items()
            }
        return Demonstrations(
            {key: array[rows] for key, array in self.arrays.items()},
            np.cumsum([ends[i] - starts[i] for i in chosen]),
            attributes,
            self.source,
        )


def validate(demos: Demonstrations) -> None:
    """Check shapes, episode ends and values.

    Raises:
        DataError: one sentence naming the file, the key and the fix.
    """
    where = demos.source
    if "action" not in demos.arrays:
        raise DataError(
            f"{where} has no key 'action' (it has {listed(demos.arrays)}); name the action array so."
        )
    for key, array in demos.arrays.items():
        check_key(key, where)
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where}: '{key}' holds {array.dtype}, not numbers; convert or leave it out.")
        if array.ndim == 0:
            raise DataError(f"{where}: '{key}' is a single number; it must have one row per step.")
        if 0 in array.shape[1:]:
            raise DataError(f"{where}: '{key}' has empty rows of shape {array.shape[1:]}; leave it out.")
    action = demos.arrays["action"]
    if action.ndim != 2 or action.shape[1] < 1:
        raise DataError(f"{where}: 'action' has shape {action.shape}; it must be (steps, action dimension).")
    steps = len(action)
    if steps == 0:
        raise DataError(f"{where} holds no step; record at least one episode.")
    for key, array in demos.arrays.items():
        if len(array) != steps:
            raise DataError(
                f"{where}: '{key}' has {len(array)} rows and 'action' has {steps}; "
                "every key needs one row per step."
            )
    problem = episode_ends_problem(demos.episode_ends, steps)
    if problem is not None:
        raise DataError(f"{where}: {problem}.")
    for key, array in demos.arrays.items():
        if array.dtype.kind == "f":
            bad = ~np.isfinite(array.reshape(steps, -1)).all(axis=1)
            if bad.any():
                raise DataError(
                    f"{where}: '{key}' is not finite at step {int(bad.argmax())} "
                    f"({int(bad.sum())} such steps); remove or repair those episodes."
                )


def episode_ends_problem(ends: NDArray[Any], steps: int) -> str | None:
    """What is wrong with ``ends`` as the ends of episodes over ``steps`` steps; None where nothing is."""
    if ends.ndim != 1 or len(ends) == 0 or ends.dtype.kind not in "iu":
        return "'episode_ends' must be a non-empty list of integers, one per episode"
    lengths = np.diff(ends.astype(np.int64), prepend=0)
    if (lengths <= 0).any():
        episode = int((lengths <= 0).argmax())
        before = int(ends[episode - 1]) if episode else 0
        return (
            f"'episode_ends' must strictly increase, but episode {episode} ends at {int(ends[episode])} "
            f"after {before}; repair it"
        )
    if int(ends[-1]) != steps:
        return (
            f"'episode_ends' ends at step {int(ends[-1])}, but there are {steps} steps; "
            "the file is cut off or its episode_ends are wrong"
        )
    return None


def read_demonstrations(
    path: Path | str,
    keys: Iterable[str] | None = None,
    image_memory_bytes: int | None = None,
    kinds: Mapping[str, Any] | None = None,
) -> Demonstrations:
    """Read a store; with ``keys`` only those (plus ``action``, and rewards and ends where present).

    Images stored as floats come back as uint8 where every value is a whole number in 0..255. Images that take
    more than ``image_memory_bytes`` are unpacked, once, into a folder beside the store, and come back as
    arrays that are mapped from there and take no memory.

    Args:
        path: a zarr folder, or a zip of one (also where the group lies one folder down in the zip);
            ``pkg://package/file`` is a file inside an installed package.
        keys: data keys; None reads all of them.
        image_memory_bytes: for the images of one key; None is half of what is free.
        kinds: key -> kind, by its name or by ``{"kind": name, ...}``, where the store does not declare it.

    Raises:
        DataError: a missing, cut-off or inconsistent store, or a missing key.
    """
    path = resolve_path(path)
    limit = free_memory_bytes() // 2 if image_memory_bytes is None else image_memory_bytes
    with open_store(path) as store:
        store.declare(kinds or {})
        names = list(store.arrays) if keys is None else chosen_keys(keys, store.arrays, path)
        reading = progress(names, "read demonstrations")
        arrays, ends = {name: store.read(name, limit) for name in reading}, store.read_ends()
    return Demonstrations(arrays, ends, store.attributes, str(path))


def write_demonstrations(
    path: Path | str,
    demos: Demonstrations,
    *,
    zarr_format: int = 2,
    attributes: Mapping[str, Any] | None = None,
    image_codec: str = "zstd",
) -> Path:
    """Write a store, as a folder or, where ``path`` ends in ``.zip``, as one file; returns its path.

    Nothing half-written stays behind: the store is written under a temporary name and renamed. Images are
    compressed by ``image_codec``, ``zstd`` or ``jpeg2000``; see :mod:`flowpolicy.data.image_codecs`.
    """
    rows = max(1, _BLOCK_BYTES // max(1, sum(array[:1].nbytes for array in demos.arrays.values())))
    with store_writer(path, demos.num_steps, zarr_format=zarr_format, image_codec=image_codec) as writer:
        writer.attributes.update({**demos.attributes, **(attributes or {})})
        for start in range(0, demos.num_steps, rows):
            writer.append({key: array[start : start + rows] for key, array in demos.arrays.items()})
        writer.finish(demos.episode_ends)
    return Path(str(path)).expanduser()
