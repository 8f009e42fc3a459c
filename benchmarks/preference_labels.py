"""Labels by a function, as preferences.py gives them: label=benchmarks.preference_labels:upright."""

import numpy as np

ANGLE = 1
"""Of the torso, in radians, among Hopper's observations; 0 is upright."""


def upright(segment):
    """The negative mean lean of Hopper's torso."""
    return -np.abs(segment.observation["observation"][:, ANGLE]).mean()


STEPS, CLEAR = 64, 4.0


def held_return(segment):
    """Push-T's return in whole multiples of 4, as if the last reward were held until step 64: an episode ends where the
    block is in place, and smaller differences say little.
    """
    total = segment.reward.sum() + (STEPS - len(segment.reward)) * segment.reward[-1]
    return round(total / CLEAR)
