"""The keys of a store: those that mean something, those that are asked for, those that it can keep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowpolicy.errors import DataError

TASK_INDEX = "task_index"
"""The key with the number of each step's task, an index into the store's attribute :data:`TASKS`."""
TASKS = "tasks"
"""The attribute of a store that lists what its tasks are called, in words."""
SOURCE = "source"
"""Key of who was in command at each step of a recorded run (:mod:`flowpolicy.data.command_source`)."""
TICK = "tick"
"""Key of the loop's tick of each step of a recorded run, as in its telemetry; ``tick / fps`` seconds."""
EPISODE_KEYS = ("reward", "terminated", "truncated", TASK_INDEX, SOURCE)
"""Keys that are kept beside those that are chosen, where there are any."""
PER_STEP_KEYS = (*EPISODE_KEYS, TICK, "done")
"""Keys of a store with one number a step that no policy observes as it is, any more than the action."""
NOT_OBSERVED = ("action", *PER_STEP_KEYS)
_LONGEST_KEY = 200


def chosen_keys(keys: Iterable[str], names: Iterable[str], where: Path | str) -> list[str]:
    """The keys that are asked for, the action, and rewards, flags and sources where there are any.

    Raises:
        DataError: a key that is not there.
    """
    names = list(names)
    has_words = TASK_INDEX in names and "task" not in names
    keys = [TASK_INDEX if key == "task" and has_words else key for key in keys]
    wanted = dict.fromkeys([*keys, "action", *(key for key in EPISODE_KEYS if key in names)])
    for key in wanted:
        if key not in names:
            raise DataError(f"{where} has no key '{key}'; it has {listed(names)}.")
    return list(wanted)


def listed(names: Iterable[str]) -> str:
    """The names in quotes, for a message."""
    return ", ".join(f"'{name}'" for name in names) or "none"


def check_key(key: Any, where: str, remedy: str = "give it a name without") -> None:
    """Refuse a key that a store cannot keep under its name.

    Raises:
        DataError: an empty name, a slash, a dot at its beginning, or what no file may be called.
    """
    ill = ""
    if not isinstance(key, str) or not key or len(key.encode("utf-8", "replace")) > _LONGEST_KEY:
        raise DataError(f"{where}: a key is {str(key)[:60]!r}; a key is a text of 1 to {_LONGEST_KEY} bytes.")
    if "/" in key or "\\" in key:
        ill = "a slash"
    elif key.startswith(".") or key == "zarr.json":
        ill = "a dot at its beginning" if key != "zarr.json" else "a meaning of its own in zarr"
    elif not key.isprintable() or any(0xD800 <= ord(letter) < 0xE000 for letter in key):
        ill = "characters that cannot be printed"
    if ill:
        raise DataError(f"{where}: the key {key!r} has {ill}, which a store cannot keep; {remedy} it.")
