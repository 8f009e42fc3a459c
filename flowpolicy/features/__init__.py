"""What a policy observes: features, each of a kind that is declared and never guessed from its shape.

One file for each kind says how it is checked, normalised, stored, encoded to tokens, and drawn at random. A
kind from outside the package is such a file too: a subclass of :class:`Feature` under
``@register(FEATURE_KINDS)``.
"""

from flowpolicy.features.depth import Depth
from flowpolicy.features.feature import FEATURE_KINDS, Feature, declared
from flowpolicy.features.image import Image
from flowpolicy.features.pose import Pose
from flowpolicy.features.presence import Presence
from flowpolicy.features.task import Task
from flowpolicy.features.undeclared import features_of, undeclared
from flowpolicy.features.vector import Vector

__all__ = [
    "FEATURE_KINDS",
    "Depth",
    "Feature",
    "Image",
    "Pose",
    "Presence",
    "Task",
    "Vector",
    "declared",
    "features_of",
    "undeclared",
]
