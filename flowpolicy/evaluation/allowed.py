"""What a checkpoint may choose of its task: environments known here, and plain settings of them.

A checkpoint comes from anywhere, and an environment is a program: ``gymnasium.make("module:Name-v0")``
imports the module, and a keyword argument may name a module or a file too. What a user names is not judged.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowpolicy.errors import TaskError
from flowpolicy.settings import shown

MODULES = ("flowpolicy_envs",)
"""Modules that register environments and come with this package; any other is named by the user."""
LARGEST = 1_000_000
"""Of the numbers among a checkpoint's keyword arguments."""
_NAME = re.compile(r"(?!\.)[\w.+\- ]{0,100}")  # no path, no module:attribute, no flag of a shell
_RENDERING = (None, "rgb_array")


def check_choice(env_id: str, env_kwargs: Mapping[str, Any], checkpoint: Path | str) -> None:
    """Refuse an environment that a checkpoint must not choose.

    Allowed are a plain Gymnasium id, which is found when it is registered; ``module:id`` of a module of
    :data:`MODULES`, or of one that this program has imported already, where the id is registered; and keyword
    arguments that are numbers, plain names, and lists and mappings of those.

    Raises:
        TaskError: any other, with what to do about it.
    """
    remedy = "name the task yourself with env=NAME (and --config-dir=FOLDER for a task of your own)"
    module, colon, name = env_id.rpartition(":")
    if colon and module not in MODULES and not (module in sys.modules and _is_registered(name)):
        raise TaskError(
            f"{checkpoint} asks for the environment {shown(env_id)}, and a checkpoint alone has no module "
            f"imported; if you trust it, {remedy}, or import that module before."
        )
    if not all(map(_is_plain, name.split("/"))):
        raise TaskError(
            f"{checkpoint} asks for the environment {shown(env_id)}, which is no Gymnasium id; {remedy}."
        )
    for key, value in _leaves("env_kwargs", env_kwargs):
        is_number = isinstance(value, (int, float)) and abs(value) <= LARGEST
        if not (value is None or is_number or (isinstance(value, str) and _is_plain(value))):
            raise TaskError(
                f"{checkpoint} sets {shown(key)} to {shown(value)}, and a checkpoint alone may set plain "
                f"names and numbers up to {LARGEST:,}, no path and no module; if you trust it, {remedy}."
            )
    if env_kwargs.get("render_mode") not in _RENDERING:
        raise TaskError(f"{checkpoint} asks for a window on this machine (render_mode); {remedy}.")


def _is_registered(name: str) -> bool:
    gymnasium = sys.modules.get("gymnasium")
    return gymnasium is not None and name in gymnasium.registry


def _is_plain(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its dotted name, and the names themselves."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield f"a name in {key}", inner
            yield from _leaves(f"{key}.{inner}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(key, item)
    else:
        yield key, value
