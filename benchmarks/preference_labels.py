"""Labels by a function, as preferences.py gives them: label=benchmarks.preference_labels:upright."""

import numpy as np

ANGLE = 1
"""Of the torso, in radians, among Hopper's observations; 0 is upright."""


def upright(segment):
    """The negative mean lean of Hopper's torso."""
    return -np.abs(segment.observation["observation"][:, ANGLE]).mean()


def coverage(segment):
    """Push-T's reward, the share of the goal that is covered, where the segment ends."""
    return segment.reward[-1]
