"""Settings are dataclasses; this turns a mapping (YAML, JSON) into one and names every mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from flowpolicy import plugins
from flowpolicy.errors import ConfigError
from flowpolicy.ranges import Allowed

T = TypeVar("T")
_SHOWN = 80  # characters of a value in a message
_REPR = reprlib.Repr()  # of a large value, no more than is shown
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = _SHOWN + 1
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _SHOWN // 3


class Settings:
    """A base of dataclasses: what their fields are declared to allow is checked when one is constructed.

    ``class TrainConfig(Settings, prefix="train")`` has its field ``steps: PositiveInt`` called
    ``train.steps`` in messages. What a declaration says of ``X`` is asked in ``X | None`` too, unless it is
    None, and of each entry in ``tuple[X, ...]`` or ``tuple[X, X]``. A subclass with more to check calls
    ``super().__post_init__()`` first.
    """

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if prefix is not None:
            cls._prefix = f"{prefix}."

    def __post_init__(self) -> None:
        for name, is_tuple, allowed in _declared(typing.cast("Any", type(self))):
            value = getattr(self, name)
            if value is not None:
                for entry in value if is_tuple else (value,):
                    if not allowed.holds(entry):
                        raise _refusal(f"{self._prefix}{name}", entry, allowed.words)


@functools.cache
def _declared(cls: type) -> tuple[tuple[str, bool, Allowed], ...]:
    """Field, whether its entries are meant, and what they may be."""
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [item.name for item in dataclasses.fields(cls)]
    return tuple((name, *found) for name in names for found in _declarations(hints[name]))


def _declarations(hint: Any) -> Iterator[tuple[bool, Allowed]]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from _declarations(arguments[0])
        yield from ((False, extra) for extra in arguments[1:] if isinstance(extra, Allowed))
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            yield from _declarations(option)
    elif origin is tuple and all(other in (arguments[0], Ellipsis) for other in arguments[1:]):
        yield from ((True, allowed) for _, allowed in _declarations(arguments[0]))


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Construct the dataclass ``cls`` from ``values``.

    Integers are accepted for floats and lists for tuples; anything else of another type is refused, and so is
    a number that is not finite.

    Args:
        cls: a dataclass; it checks its own ranges when constructed.
        values: the settings, by field name.
        where: what the message calls this group of settings, e.g. ``train``; empty at the top.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a missing key, or a value of a wrong type.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in fields]))
    hints = _type_hints(typing.cast("Any", cls))
    arguments = {key: checked(value, hints[key], f"{prefix}{key}") for key, value in values.items()}
    for name, item in fields.items():
        has_default = (
            item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        )
        if name not in arguments and not has_default:
            raise ConfigError(f"{prefix}{name} is missing; give it a value.")
    return cls(**arguments)


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def unknown_key(key: str, valid: Collection[str]) -> str:
    """One sentence that refuses ``key`` and names the nearest valid one."""
    near = difflib.get_close_matches(key[:_SHOWN], valid, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(sorted(valid))}."
    return f"Unknown setting {shown(key)}; {hint}"


def defaults(cls: Any) -> dict[str, Any]:
    """The settings of a dataclass that have a default."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        if item.default is not dataclasses.MISSING:
            found[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            value: Any = item.default_factory()
            is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
            found[item.name] = dataclasses.asdict(value) if is_config else value
    return found


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise a ConfigError unless ``condition`` holds: '<name> is <value>; it must be <allowed>.'"""
    if not condition:
        raise _refusal(name, value, allowed)


def _refusal(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name} is {shown(value)}; it must be {allowed}.")


def shown(value: object) -> str:
    """A value as a message shows it: its ``repr``, cut where it is long."""
    text = _REPR.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def choose(options: Mapping[str, T], name: str, where: str) -> T:
    """Look ``name`` up in ``options``, which plugins may have to fill first, or refuse it with the nearest
    valid name.
    """
    if name not in options:
        plugins.load()
    if name not in options:
        near = difflib.get_close_matches(str(name)[:_SHOWN], options, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ConfigError(f"{where} is {shown(name)}{hint}; choose one of {', '.join(sorted(options))}.")
    return options[name]


def checked(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint``, or a ConfigError that names ``where``; see :func:`build`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        some = [option for option in options if option is not type(None)]
        if len(some) == 1:
            return checked(value, some[0], where)  # what is wrong inside it is what there is to say
        for option in some:
            with contextlib.suppress(ConfigError):
                return checked(value, option, where)
        raise ConfigError(f"{where} is {shown(value)}; it must be {hint}.")
    if hint is Any:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return _checked_tuple(value, typing.get_args(hint), where)
    if origin is dict and isinstance(value, Mapping):
        kind_of_key, kind = typing.get_args(hint)
        return {
            checked(key, kind_of_key, f"a key of {where}"): checked(item, kind, f"{where}.{str(key)[:40]}")
            for key, item in value.items()
        }
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _checked_float(value, where)
    expected = origin or hint
    if expected is int and isinstance(value, bool):
        raise ConfigError(f"{where} is {value!r}; it must be an integer.")
    if isinstance(expected, type) and not isinstance(value, expected):
        if dataclasses.is_dataclass(expected) and isinstance(value, Mapping):
            chosen = getattr(expected, "from_settings", None)  # of several classes, which the values choose
            return chosen(value, where) if chosen else build(expected, value, where)
        raise ConfigError(f"{where} is {shown(value)}; it must be of type {expected.__name__}.")
    return value


def _checked_float(value: float | str, where: str) -> float:
    try:
        number = float(value)  # YAML 1.1 reads 1e-4 as a string
    except (ValueError, OverflowError):
        raise ConfigError(f"{where} is {shown(value)}; it must be a number.") from None
    require(math.isfinite(number), where, value, "a finite number")
    return number


def _checked_tuple(values: Sequence[Any], kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if kinds[1:] == (Ellipsis,):
        kinds = kinds[:1] * len(values)
    if len(values) != len(kinds):
        raise ConfigError(f"{where} is {shown(list(values))}; it must have {len(kinds)} entries.")
    return tuple(
        checked(value, kind, f"{where}[{index}]")
        for index, (value, kind) in enumerate(zip(values, kinds, strict=True))
    )
