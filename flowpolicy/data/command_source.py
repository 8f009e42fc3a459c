"""Who was in command at each step of a recorded run: the policy, an operator, or nobody.

A store's ``data/source`` ``(steps,)`` says so. Demonstrations without it are the operator's throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.keys import SOURCE
from flowpolicy.errors import DataError

NAMES = ("policy", "operator", "safe action")
"""What the numbers of ``data/source`` mean; a safe action was sent for want of a valid command."""
POLICY, OPERATOR, SAFE = range(len(NAMES))


def sources_of(arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """Who was in command, ``(steps,)``; None where the arrays do not say."""
    found = arrays.get(SOURCE)
    return found if found is not None and found.ndim == 1 and found.dtype.kind in "iu" else None


def source_or_operator(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int8]:
    """Who was in command, ``(steps,)``: the operator throughout where the arrays do not say."""
    source = sources_of(arrays)
    steps = len(arrays["action"])
    return np.full(steps, OPERATOR, np.int8) if source is None else source.astype(np.int8)


def commanded_shares(arrays: Mapping[str, NDArray[Any]]) -> dict[str, float] | None:
    """Share of the steps by who was in command; None where the arrays do not say."""
    source = sources_of(arrays)
    if source is None or not len(source):
        return None
    return {name: float(np.mean(source == number)) for number, name in enumerate(NAMES)}


def learnt_steps(
    arrays: Mapping[str, NDArray[Any]], only: str | None, where: str
) -> NDArray[np.bool_] | None:
    """Which steps show what a policy should do, ``(steps,)``; None: all of them.

    Safe actions never do. With ``only="operator"`` neither do the policy's own steps: what is left are
    corrections, as HG-DAgger (Kelly et al. 2019) trains on.

    Args:
        arrays: of the demonstrations.
        only: ``operator``, ``policy`` or None for both.
        where: the demonstrations, for messages.

    Raises:
        DataError: no step is left.
    """
    source = sources_of(arrays)
    if source is None:
        return None
    learnt = source != SAFE if only is None else source == NAMES.index(only)
    if not learnt.any():
        whose = "" if only is None else f" of the {only}'s"
        raise DataError(
            f"{where} has no step{whose} to learn from; leave it out, or change data.only_source."
        )
    return np.asarray(learnt)
