"""Episodes of any format, laid end to end and checked: what every importer ends with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.rounding import collapses_in_float32
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import DataError

Episode = Mapping[str, NDArray[Any]]


def join_episodes(
    episodes: Sequence[Episode], names: Sequence[str], source: str, attributes: Mapping[str, Any]
) -> Demonstrations:
    """Lay episodes end to end.

    Args:
        episodes: per episode, key -> ``(steps, ...)``; all keys of one episode have the same steps.
        names: what messages call each episode.
        source: the file they come from.
        attributes: where the data come from.

    Raises:
        DataError: no episode, an empty one, keys or shapes that differ between episodes, or values that
            :func:`flowpolicy.data.store.validate` refuses.
    """
    if not episodes:
        raise DataError(f"{source} holds no episode; record at least one.")
    first = episodes[0]
    for name, episode in zip(names, episodes, strict=True):
        _check_episode(episode, first, name, names[0], source)
    arrays = {key: numeric(np.concatenate([e[key] for e in episodes]), key, source) for key in first}
    ends = np.cumsum([len(episode["action"]) for episode in episodes])
    return Demonstrations(arrays, ends, dict(attributes), source)


def numeric(array: NDArray[Any], key: str, source: str) -> NDArray[Any]:
    """``array`` in the store's types: integer actions, and wide floats that float32 can tell apart, as
    float32; the rest as it is.

    Raises:
        DataError: what is not a number, or a value float32 cannot hold.
    """
    if array.dtype.kind not in "fiub":
        raise DataError(f"{source}: '{key}' holds {array.dtype}, not numbers; convert or leave it out.")
    wide = array.dtype.kind == "f" and array.dtype != np.float32
    if not wide and not (key == "action" and array.dtype.kind in "iub"):
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    if wide and (np.isinf(narrow) & np.isfinite(array)).any():
        raise DataError(
            f"{source}: '{key}' reaches {np.abs(array).max():.3g}, beyond float32; rescale or repair it."
        )
    return array if wide and collapses_in_float32(array) else narrow


def natural_order(names: Sequence[str]) -> list[str]:
    """Names sorted by the numbers in them, so that ``demo_10`` comes after ``demo_2``."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def _check_episode(episode: Episode, first: Episode, name: str, first_name: str, source: str) -> None:
    for key in {**first, **episode}:
        if key not in episode or key not in first:
            has, lacks = (first_name, name) if key in first else (name, first_name)
            raise DataError(
                f"{source}: '{lacks}' has no key '{key}', which '{has}' has; make the episodes alike."
            )
        if episode[key].ndim == 0:
            raise DataError(
                f"{source}: '{key}' of '{name}' is a single number; it must have one row per step."
            )
        if episode[key].shape[1:] != first[key].shape[1:]:
            raise DataError(
                f"{source}: '{key}' has rows of shape {episode[key].shape[1:]} in '{name}' and "
                f"{first[key].shape[1:]} in '{first_name}'; make the episodes alike."
            )
    if "action" not in episode:
        raise DataError(f"{source}: '{name}' has no actions; a demonstration needs them.")
    steps = len(episode["action"])
    for key, array in episode.items():
        if len(array) != steps:
            raise DataError(
                f"{source}: '{key}' has {len(array)} rows in '{name}' and its actions have {steps}; "
                "every key needs one row per step."
            )
    if steps == 0:
        raise DataError(f"{source}: '{name}' has no step; remove that episode.")
