"""From a source's keys to a task's: rename, concatenate, transform, select; and the bounds of actions."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.episodes import numeric
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.zarr_reading import EPISODE_KEYS, first_line
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.settings import require

logger = logging.getLogger(__name__)
_TOLERANCE = 1e-5


def rename_keys(demos: Demonstrations, names: Mapping[str, str]) -> Demonstrations:
    """Demonstrations with keys renamed, old -> new.

    Raises:
        DataError: a key that is not there, or two that would get one name.
    """
    for old in names:
        _require_key(demos, old)
    arrays: dict[str, NDArray[Any]] = {}
    for key, array in demos.arrays.items():
        new = names.get(key, key)
        if new in arrays:
            raise DataError(
                f"{demos.source}: two keys would be called '{new}'; rename or leave out one of them."
            )
        arrays[new] = array
    return _with(demos, arrays)


def concatenate_keys(demos: Demonstrations, groups: Mapping[str, Sequence[str]]) -> Demonstrations:
    """Demonstrations where each new key holds the flattened rows of several, side by side, in place of them.

    Raises:
        DataError: a key that is not there, or images among them.
    """
    arrays = dict(demos.arrays)
    for new, parts in groups.items():
        if isinstance(parts, str) or not parts:
            raise DataError(f"concatenate.{new} is {parts!r}; it must be a list of keys.")
        for key in parts:
            _require_key(demos, key)
            if demos.arrays[key].ndim > 3:
                raise DataError(
                    f"{demos.source}: '{key}' holds images; they cannot be concatenated into '{new}'."
                )
        rows = [demos.arrays[key].reshape(demos.num_steps, -1).astype(np.float32) for key in parts]
        for key in parts:
            arrays.pop(key, None)
        arrays[new] = np.concatenate(rows, axis=1)
    return _with(demos, arrays)


def transform(demos: Demonstrations, dotted: str) -> Demonstrations:
    """Demonstrations whose arrays went through ``module:function``, a dict of arrays to a dict of arrays.

    Raises:
        ConfigError: a function that cannot be found.
        DataError: a function that fails on these data or does not return arrays.
    """
    module, _, name = dotted.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"demo_transform '{dotted}' cannot be found ({first_line(error)}); write it module:function."
        ) from error
    try:
        arrays = function(dict(demos.arrays))
    except KeyError as error:
        raise DataError(
            f"{demos.source} lacks {error}, which demo_transform '{dotted}' needs; is it for this data?"
        ) from error
    except Exception as error:  # whatever a user's function raises
        raise DataError(
            f"demo_transform '{dotted}' fails on {demos.source} ({first_line(error)})."
        ) from error
    if not isinstance(arrays, Mapping) or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise DataError(f"demo_transform '{dotted}' must return a dict of numpy arrays.")
    return _with(demos, {key: numeric(array, key, demos.source) for key, array in arrays.items()})


def select_keys(demos: Demonstrations, keys: Iterable[str]) -> Demonstrations:
    """Demonstrations with only the given keys, the action, and rewards and ends where present."""
    kept = dict.fromkeys([*keys, "action", *(key for key in EPISODE_KEYS if key in demos.arrays)])
    for key in kept:
        _require_key(demos, key)
    return _with(demos, {key: demos.arrays[key] for key in kept})


def bounded_actions(demos: Demonstrations, bounds: Sequence[float] | None, outside: str) -> Demonstrations:
    """Demonstrations whose actions lie in ``bounds`` (low, high); None allows any.

    Args:
        demos: the demonstrations.
        bounds: low and high, the same for every action dimension.
        outside: ``refuse`` actions that leave the bounds by more than rounding, or ``clip`` and count them.

    Raises:
        DataError: an action outside that is to be refused.
    """
    require(outside in ("refuse", "clip"), "out_of_bounds", outside, "'refuse' or 'clip'")
    if bounds is None:
        return demos
    is_pair = len(bounds) == 2 and float(bounds[0]) < float(bounds[1])
    require(is_pair, "action_bounds", list(bounds), "[low, high] with low < high")
    low, high = float(bounds[0]), float(bounds[1])
    slack = _TOLERANCE * max(1.0, high - low)
    action = demos.arrays["action"]
    beyond = (action < low - slack) | (action > high + slack)
    if beyond.any() and outside == "refuse":
        steps = beyond.any(axis=1)
        raise DataError(
            f"{demos.source}: 'action' leaves its bounds [{low:g}, {high:g}] in {int(steps.sum())} steps "
            f"(first at step {int(steps.argmax())}); set out_of_bounds=clip, or give other action_bounds."
        )
    if beyond.any():
        logger.info(
            "%s: %d of %d action entries (%.1f%%) lie outside [%g, %g] and are clipped.",
            demos.source, beyond.sum(), beyond.size, 100 * beyond.mean(), low, high,
        )  # fmt: skip
        demos.attributes["actions_clipped"] = int(beyond.sum())
    return _with(demos, {**demos.arrays, "action": np.clip(action, low, high)})


def _with(demos: Demonstrations, arrays: dict[str, NDArray[Any]]) -> Demonstrations:
    return Demonstrations(arrays, demos.episode_ends, demos.attributes, demos.source)


def _require_key(demos: Demonstrations, key: str) -> None:
    if key not in demos.arrays:
        has = ", ".join(f"'{name}'" for name in demos.arrays)
        raise DataError(f"{demos.source} has no key '{key}'; it has {has}.")
