"""Packages of the extras: imported where they are needed, and where one is missing, its extra is named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from flowpolicy.errors import ConfigError


@contextlib.contextmanager
def optional(need: str, extra: str, raised: Callable[[str], BaseException] = ConfigError) -> Iterator[None]:
    """A block that imports what ``flowpolicy[extra]`` brings.

    ``with optional("Plots need matplotlib", "train"): import matplotlib``

    Args:
        need: the sentence's first words; ``{name}`` stands for the module that is missing.
        extra: that brings it.
        raised: the error, made of the sentence.
    """
    try:
        yield
    except ImportError as error:
        raise raised(missing(need, extra, error.name)) from error


def missing(need: str, extra: str, name: str | None = None) -> str:
    """The sentence of :func:`optional`, where the module ``name`` is missing."""
    return f"{need.replace('{name}', repr(name))}; install it with: pip install 'flowpolicy[{extra}]'."
