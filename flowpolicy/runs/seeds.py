"""Many seeds from one: what belongs to different runs, processes or purposes shares no random number."""

from __future__ import annotations

import numpy as np

FIRST_DERIVED = 2**30
"""Derived seeds lie from here to 2^31; those that people type and evaluations list lie below."""


def derived_seed(seed: int, *purpose: int | str) -> int:
    """A seed for one purpose of a run, by :class:`numpy.random.SeedSequence`.

    Environments in a row may take it and the integers after it: the rows of two runs whose seeds are
    neighbours do not meet, as ``seed + i`` would.

    Args:
        seed: of the run, 0 or more.
        purpose: names and numbers that tell it from other purposes, each number 0 or more.
    """
    key = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in purpose]
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1)
    return FIRST_DERIVED + int(state[0]) % FIRST_DERIVED
