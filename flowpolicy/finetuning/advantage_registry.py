"""The advantages that a configuration may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowpolicy.finetuning.advantages import GAE, AdvantageStrategy
from flowpolicy.finetuning.group_advantages import GroupAdvantages
from flowpolicy.settings import build, choose

ADVANTAGES: dict[str, type[AdvantageStrategy]] = {"gae": GAE, "group": GroupAdvantages}
"""By name; one's own that is put here can be named in a configuration and is saved with a model."""


def build_advantages(settings: Mapping[str, Any]) -> AdvantageStrategy:
    """The strategy that ``settings["name"]`` names, with the other settings.

    Raises:
        ConfigError: an unknown name, an unknown setting, or one out of range.
    """
    kind = choose(ADVANTAGES, settings.get("name", "gae"), "advantages.name")
    return build(kind, {key: value for key, value in settings.items() if key != "name"}, "advantages")
