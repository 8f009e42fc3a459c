"""User extensions: registries of named parts, and user modules that register more.

A plugin is any module that can be imported from the working directory, such as ``robust_flow.py``::

    @register(OBJECTIVES)
    class RobustFlow(FlowMatching): ...

The commands take it as ``flowpolicy pretrain plugins=robust_flow policy=robust_flow``.
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

_IF_THERE = "?"  # behind the name of a module that was imported and not named: it need not be found

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
        module = str(getattr(item, "__module__", type(item).__module__))
        if module.partition(".")[0] not in ("flowpolicy", "__main__"):
            _remember([module + _IF_THERE])  # so that processes that this one starts find it
        return item

    return decorate


def load(modules: Iterable[str] = ()) -> None:
    """Import modules that register something, found from the working directory too, and those that this
    program, or the one that started it, has named or imported before.

    Raises:
        ConfigError: one that was named cannot be imported.
    """
    named = [*modules]
    for name in dict.fromkeys([*_named(), *named]):
        if name.rstrip(_IF_THERE) in sys.modules:
            continue
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # last: what is installed is not shadowed
        try:
            importlib.import_module(name.rstrip(_IF_THERE))
        except Exception as error:  # whatever a user's module raises
            if name.endswith(_IF_THERE):
                continue
            if isinstance(error, ConfigError):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"The plugin '{name}' cannot be imported ({reason}).") from error
    _remember(named)


def attribute(name: str, setting: str) -> Any:
    """What ``module:attribute`` names, of an installed module or a file of the working directory.

    Raises:
        ConfigError: it cannot be found; the message names the ``setting`` that asked for it.
    """
    module, _, found = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: what is installed is not shadowed
    try:
        return getattr(importlib.import_module(module), found)
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(
            f"{setting}={name} cannot be found ({type(error).__name__}: {error}); name module:attribute, "
            "of an installed module or a file of the present folder."
        ) from error


def _remember(names: Iterable[str]) -> None:
    known = [*_named(), *names]
    together = [name for name in dict.fromkeys(known) if name[-1] != _IF_THERE or name[:-1] not in known]
    if together:
        os.environ[VARIABLE] = ",".join(together)


def _kind(item: Any) -> tuple[str, str]:
    cls = item if isinstance(item, type) else type(item)
    return cls.__module__, cls.__qualname__


def _named() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]
