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

from flowpolicy.data.image_codecs import image_codec as codec_for_images
from flowpolicy.data.zarr_reading import free_memory_bytes, import_zarr, listed, read_unchecked, resolve_path
from flowpolicy.errors import DataError
from flowpolicy.observations import is_image
from flowpolicy.settings import require
from flowpolicy.storage import atomic_file

_CHUNK_BYTES = 1 << 20


@dataclass
class Demonstrations:
    """Episodes in memory.

    Attributes:
        arrays: key -> ``(steps, ...)``; always holds ``action`` ``(steps, A)``.
        episode_ends: ``(episodes,)`` int64, strictly increasing, the last equal to ``steps``.
        attributes: where the data come from (env_id, fps, source, licence, recipe, ...).
        source: the file they were read from, for messages.
    """

    arrays: dict[str, NDArray[Any]]
    episode_ends: NDArray[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    source: str = "demonstrations"

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
    path: Path | str, keys: Iterable[str] | None = None, image_memory_bytes: int | None = None
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

    Raises:
        DataError: a missing, cut-off or inconsistent store, or a missing key.
    """
    path = resolve_path(path)
    limit = free_memory_bytes() // 2 if image_memory_bytes is None else image_memory_bytes
    arrays, ends, attributes = read_unchecked(path, keys, limit)
    return Demonstrations(arrays, ends, attributes, str(path))


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
    zarr = import_zarr()
    codec = codec_for_images(image_codec)
    require(codec is None or zarr_format == 2, "zarr_format", zarr_format, "2 with another codec than zstd")
    path = check_new(path)
    if zarr_format not in (2, 3):
        raise DataError(f"zarr_format is {zarr_format}; it must be 2 or 3.")
    with atomic_file(path) as temporary:
        is_zip = path.suffix == ".zip"
        store: Any = zarr.storage.ZipStore(str(temporary), mode="w") if is_zip else str(temporary)
        try:
            attrs = {**demos.attributes, **(attributes or {})}
            group = zarr.open_group(store, mode="w", zarr_format=zarr_format, attributes=attrs)
            data, meta = group.create_group("data"), group.create_group("meta")
            for key, array in demos.arrays.items():
                is_frames = array.dtype == np.uint8 and is_image(array.shape[1:])
                _write_array(data, key, array, zarr_format, codec if is_frames else None)
            _write_array(meta, "episode_ends", demos.episode_ends, zarr_format)
        finally:
            if is_zip:
                store.close()
    return path


def check_new(path: Path | str) -> Path:
    """``path``, expanded; refused where something stands there already."""
    path = Path(str(path)).expanduser()
    if path.exists() or path.is_symlink():
        raise DataError(f"{path} exists already; remove it or choose another name.")
    return path


def _write_array(
    group: Any, key: str, array: NDArray[Any], zarr_format: int, frame_codec: Any | None = None
) -> None:
    rows = max(1, min(len(array), _CHUNK_BYTES // max(1, array[:1].nbytes)))
    if frame_codec is not None:
        rows, compressors = 1, frame_codec
    elif zarr_format == 2:
        import numcodecs

        compressors = numcodecs.Blosc("zstd", clevel=7, shuffle=numcodecs.Blosc.BITSHUFFLE)
    else:
        from zarr.codecs import BloscCodec

        compressors = BloscCodec(cname="zstd", clevel=7, shuffle="bitshuffle")
    created = group.create_array(
        key,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(rows, *array.shape[1:]),
        compressors=compressors,
        config={"write_empty_chunks": True},  # a chunk of zeros is written too: a missing one means damage
    )
    # One chunk at a time: zarr writes many side by side, and where one fails (a full disk) the others would
    # go on after the error and bring a removed temporary store back.
    for start in range(0, len(array), rows):
        created[start : start + rows] = array[start : start + rows]
