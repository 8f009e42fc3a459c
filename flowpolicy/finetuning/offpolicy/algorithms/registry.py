"""The off-policy algorithms that a configuration may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowpolicy.finetuning.offpolicy.algorithms.algorithm import Algorithm
from flowpolicy.finetuning.offpolicy.algorithms.dsrl import DSRL
from flowpolicy.finetuning.offpolicy.algorithms.expo import EXPO
from flowpolicy.finetuning.offpolicy.algorithms.qchunk import QChunk
from flowpolicy.settings import build, choose

ALGORITHMS: dict[str, type[Algorithm]] = {each.name: each for each in (EXPO, QChunk, DSRL)}
"""By name; one of one's own that is put here can be named in a configuration and is saved with a model."""


def build_algorithm(settings: Mapping[str, Any]) -> Algorithm:
    """The algorithm that ``settings["name"]`` names, with the other settings.

    Raises:
        ConfigError: an unknown name, an unknown setting, or one out of range.
    """
    kind = choose(ALGORITHMS, settings.get("name", EXPO.name), "algorithm.name")
    return build(kind, {key: value for key, value in settings.items() if key != "name"}, "algorithm")
