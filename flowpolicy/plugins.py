"""User extensions: registries of named parts, and user modules that register more.

A plugin is any module that can be imported from the working directory, such as ``mean_flow.py``::

    @register(OBJECTIVES)
    class MeanFlow(Flow): ...

The commands take it as ``flowpolicy pretrain plugins=mean_flow policy=mean_flow``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

from flowpolicy.errors import ConfigError

VARIABLE = "FLOWPOLICY_PLUGINS"
"""Environment variable with the modules' names, by which processes that this one starts find them too."""

T = TypeVar("T")


def register(registry: MutableMapping[str, Any]) -> Callable[[T], T]:
    """Decorator: put a class, or an object, into ``registry`` under its ``name``.

    Raises:
        ConfigError: another one has the name.
    """

    def decorate(item: T) -> T:
        name = str(getattr(item, "name", ""))
        before = registry.get(name)
        if not name or (before is not None and _kind(before) != _kind(item)):  # the same: a reload
            raise ConfigError(f"{item!r} is called '{name}'; give it a name of its own.")
        registry[name] = item
        return item

    return decorate


def load(modules: Iterable[str] = ()) -> None:
    """Import modules that register something, found from the working directory too, and those that this
    program, or the one that started it, has named before.

    Raises:
        ConfigError: one cannot be imported.
    """
    names = list(dict.fromkeys([*_named(), *modules]))
    for name in names:
        if name in sys.modules:
            continue
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"The plugin '{name}' cannot be imported ({error}).") from error
    if names:
        os.environ[VARIABLE] = ",".join(names)


def _kind(item: Any) -> str:
    return str(getattr(item, "__qualname__", type(item).__qualname__))


def _named() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]
