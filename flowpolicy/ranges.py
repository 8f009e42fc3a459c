"""Ranges, declared in the type of a setting beside its default: ``steps: PositiveInt = 3_000``.

:class:`~flowpolicy.settings.Settings` checks them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Allowed:
    """Which values of its type a setting may have: ``steps: Annotated[int, Allowed(is_even, "even")] = 2``.

    Attributes:
        holds: whether a value is allowed.
        words: the same for a message, after "it must be".
    """

    holds: Callable[[Any], bool]
    words: str


def at_least(least: float, words: str = "") -> Allowed:
    """``least`` or more."""
    return Allowed(lambda value: bool(value >= least), words or f"at least {least}")


def at_most(most: float) -> Allowed:
    """``most`` or less."""
    return Allowed(lambda value: bool(value <= most), f"at most {most}")


def between(least: float, most: float) -> Allowed:
    """``least`` to ``most``, both included."""
    return Allowed(lambda value: bool(least <= value <= most), f"between {least} and {most}")


def within(interval: str) -> Allowed:
    """An interval as mathematics writes it, such as ``(0, 1]``."""
    least, most = map(float, interval[1:-1].split(","))
    above = operator.gt if interval.startswith("(") else operator.ge
    below = operator.lt if interval.endswith(")") else operator.le
    return Allowed(lambda value: bool(above(value, least) and below(value, most)), f"in {interval}")


def positive_to(most: float) -> Allowed:
    """More than 0, up to ``most``."""
    return Allowed(lambda value: bool(0 < value <= most), f"positive and at most {most:g}")


def one_of(options: Collection[str], words: str = "") -> Allowed:
    """One of these names."""
    named = f"one of {', '.join(options)}" if len(options) > 2 else " or ".join(options)
    return Allowed(lambda value: value in options, words or named)


def not_empty(entry: str) -> Allowed:
    """One ``entry`` or more."""
    return Allowed(bool, f"at least one {entry}")


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, Allowed(lambda value: bool(value > 0), "positive")]
PositiveFinite = Annotated[float, Allowed(lambda value: 0 < value < math.inf, "finite and positive")]
NonNegativeFloat = Annotated[float, at_least(0)]
Share = Annotated[float, within("[0, 1]")]
BelowOne = Annotated[float, within("[0, 1)")]
Episodes = Annotated[bool | int, at_least(0, "0 or more episodes to record, true or false")]
"""How many are recorded; true records one."""
