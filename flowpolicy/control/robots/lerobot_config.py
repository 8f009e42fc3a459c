"""A robot of lerobot from settings, by lerobot's own config classes."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowpolicy.errors import ConfigError, TaskError
from flowpolicy.settings import choose, unknown_key

INSTALL = (
    "install it on the robot's machine with: pip install 'lerobot[feetech]' (or the extra of its motors)."
)
DEFAULT_CAMERA = "opencv"


def lerobot_robot(kind: str, settings: Mapping[str, Any]) -> Any:
    """A ``lerobot.robots.Robot``, not connected.

    Robots and cameras are those that lerobot registers, those of installed packages named ``lerobot_robot_*``
    and ``lerobot_camera_*``, and those of modules that were imported before.

    Args:
        kind: lerobot's name of the robot, ``so101_follower``.
        settings: of its config class: ``port``, ``id``, ``cameras``, ...

    Raises:
        ConfigError: lerobot is not installed, knows no such robot or camera, or refuses a setting.
        TaskError: the robot cannot be made.
    """
    try:
        package, cameras = (importlib.import_module(f"lerobot.{name}") for name in ("robots", "cameras"))
    except ImportError as error:
        raise ConfigError(f"robot=lerobot needs the package {error.name!r}; {INSTALL}") from error
    _register_all(package, cameras)
    robots = package.RobotConfig.get_known_choices()
    if not kind:
        raise ConfigError(f"robot.type is missing; choose one of {', '.join(sorted(robots))}.")
    config = _configured(choose(robots, kind, "robot.type"), settings, "robot")
    try:
        return package.make_robot_from_config(config)
    except ImportError as error:
        raise ConfigError(f"robot.type={kind} needs the package {error.name!r}; {INSTALL}") from error
    except Exception as error:  # a driver may raise anything
        raise TaskError(f"robot.type={kind} cannot be made ({type(error).__name__}: {error}).") from error


def _register_all(*packages: types.ModuleType) -> None:
    """Import what registers configs: sub-packages, as far as what they need is there, and plugins."""
    for package in packages:
        for module in pkgutil.iter_modules(package.__path__):
            if module.ispkg:
                with suppress(ImportError):
                    importlib.import_module(f"{package.__name__}.{module.name}")
    with suppress(ImportError, AttributeError):
        importlib.import_module("lerobot.utils.import_utils").register_third_party_plugins()


def _configured(cls: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    """An instance of a config class of lerobot's."""
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for key in settings:
        if key not in fields:
            raise ConfigError(unknown_key(f"{where}.{key}", [f"{where}.{name}" for name in fields]))
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, item in fields.items():
        if (item.default, item.default_factory) == required and name not in settings:
            raise ConfigError(f"{where}.{name} is missing; give it a value.")
    values = {key: _value(value, hints.get(key), f"{where}.{key}") for key, value in settings.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except Exception as error:  # whatever the class checks
        raise ConfigError(f"{where}: lerobot refuses it ({error}).") from error


def _value(value: Any, hint: Any, where: str) -> Any:
    """A setting as the class declares it: a config, a mapping of them, a path or an enumeration."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        return None
    for option in options:
        if typing.get_origin(option) is dict and isinstance(value, Mapping):
            inner = typing.get_args(option)[1]
            return {key: _value(each, inner, f"{where}.{key}") for key, each in value.items()}
        if not isinstance(option, type):
            continue
        if isinstance(value, Mapping) and hasattr(option, "get_known_choices"):
            return _chosen(option, value, where)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(option):
            return _configured(option, value, where)
        if issubclass(option, Path) and isinstance(value, str):
            return Path(value).expanduser()
        if issubclass(option, enum.Enum):
            try:
                return option(value)
            except ValueError as error:
                raise ConfigError(f"{where}: lerobot refuses it ({error}).") from error
    return value


def _chosen(base: Any, settings: Mapping[str, Any], where: str) -> Any:
    """A config of one of several registered classes, which ``type`` chooses."""
    settings = dict(settings)
    known = base.get_known_choices()
    kind = settings.pop("type", DEFAULT_CAMERA if DEFAULT_CAMERA in known else None)
    return _configured(choose(known, str(kind), f"{where}.type"), settings, where)
