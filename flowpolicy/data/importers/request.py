"""The settings of an import, besides the file and the format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from flowpolicy.data.importers.source import Bounds
from flowpolicy.features.image import MOST_PIXELS
from flowpolicy.settings import require


class Request(TypedDict, total=False):
    """Keyword arguments of an import; columns go by their key or by the source's own, full name.

    The steps are: list, rename, concatenate, choose, read, check; with a transform: list, rename,
    concatenate, read, transform, choose, check. What is not chosen is not read.

    Attributes:
        rename: column -> new key.
        concatenate: new key -> columns whose flattened rows, side by side, make it; it replaces them.
        action: the column, or columns side by side, that make the action; None is the format's own.
        kinds: column -> kind (``image``, ``vector``, ``depth``, ``pose``, ...), by its name or by
            ``{"kind": name, ...}`` with settings, where the source does not declare what it holds.
        demo_transform: dotted ``module:function`` from a dict of arrays to a dict of arrays, step by step.
        keys: the keys to keep beside ``action``, ``reward`` and the flags of episode ends; None: what the
            format takes by itself.
        action_bounds: (low, high), numbers or one for each dimension, that every action entry must lie in;
            None takes the source's, if any.
        out_of_bounds: what happens to actions outside: ``refuse`` or ``clip`` (their number is logged).
        allow_gaps: take episodes in which the times of the steps show a gap, with a warning.
        continuous_quaternions: undo changes between q and -q inside an episode.
        image_size: height and width that all images are brought to; None leaves them.
        every: n, to keep the steps 0, n, 2n, ... of each episode; the rate becomes an n-th, rewards in
            between are summed and flags are joined.
        options: keyword arguments of the format's importer.
    """

    rename: Mapping[str, str] | None
    concatenate: Mapping[str, Sequence[str]] | None
    action: str | Sequence[str] | None
    kinds: Mapping[str, Any] | None
    demo_transform: str | None
    keys: Iterable[str] | None
    action_bounds: Sequence[Any] | None
    out_of_bounds: str
    allow_gaps: bool
    continuous_quaternions: bool
    image_size: Sequence[int] | None
    every: int
    options: Mapping[str, Any] | None


def wants_clipping(request: Request) -> bool:
    """Whether actions outside their bounds are to be clipped."""
    choice = request.get("out_of_bounds", "refuse")
    require(choice in ("refuse", "clip"), "out_of_bounds", choice, "'refuse' or 'clip'")
    return choice == "clip"


def requested_size(request: Request) -> tuple[int, int] | None:
    """Height and width of the images that are asked for; None where they stay as they are.

    Raises:
        ConfigError: no two whole numbers within the range of a policy's images.
    """
    given = request.get("image_size")
    if given is None:
        return None
    size = tuple(given) if isinstance(given, Sequence) else ()
    is_size = len(size) == 2 and all(type(side) is int and 0 < side <= MOST_PIXELS for side in size)
    require(is_size, "image_size", given, f"[height, width], each from 1 to {MOST_PIXELS}")
    return size[0], size[1]


def requested_every(request: Request) -> int:
    """Of how many steps one is kept."""
    every = request.get("every", 1)
    require(type(every) is int and every > 0, "every", every, "a whole number above 0")
    return every


def requested_bounds(request: Request) -> Bounds | None:
    """The bounds that the user gives for the actions; None where the source's hold.

    Raises:
        ConfigError: no pair of numbers, or of lists of numbers, in order.
    """
    given = request.get("action_bounds")
    if given is None:
        return None
    allowed = "[low, high] with low < high, numbers or one for each action dimension"
    try:
        low, high = (np.asarray(bound, np.float64) for bound in given)
        is_pair = low.ndim < 2 and low.shape == high.shape and bool((low < high).all())
    except (TypeError, ValueError):
        is_pair = False
    require(is_pair, "action_bounds", given, allowed)
    return Bounds(low, high)
