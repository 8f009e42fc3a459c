"""Which of two segments of Hopper stands more upright: label=benchmarks.upright:upright."""

import numpy as np

ANGLE = 1
"""Of the torso, in radians, among Hopper's observations; 0 is upright."""


def upright(segment):
    """The negative mean lean of the torso."""
    return -np.abs(segment.observation["observation"][:, ANGLE]).mean()
