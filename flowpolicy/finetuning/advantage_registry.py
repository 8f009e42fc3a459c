"""The advantages that a configuration may name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from flowpolicy.finetuning.advantages import GAE, AdvantageStrategy
from flowpolicy.finetuning.group_advantages import GroupAdvantages
from flowpolicy.settings import build, choose

ADVANTAGES: dict[str, type[AdvantageStrategy]] = {"gae": GAE, "group": GroupAdvantages}
"""By name; one's own that is put here can be named in a configuration and is saved with a model."""


def build_advantages(settings: Mapping[str, Any], **of_run: float) -> AdvantageStrategy:
    """The strategy that ``settings["name"]`` names, with the other settings.

    Args:
        settings: of the strategy.
        of_run: what a run decides in their place, such as ``gamma``, for a strategy that has it.

    Raises:
        ConfigError: an unknown name, an unknown setting, or one out of range.
    """
    kind = choose(ADVANTAGES, settings.get("name", "gae"), "advantages.name")
    has = {field.name for field in dataclasses.fields(cast("Any", kind))}
    values = {key: value for key, value in settings.items() if key != "name"}
    return build(kind, values | {key: of_run[key] for key in has & of_run.keys()}, "advantages")
