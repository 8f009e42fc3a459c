"""The update rules that a configuration may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowpolicy.finetuning.rules.awm import AWM
from flowpolicy.finetuning.rules.gdro import GDRO
from flowpolicy.finetuning.rules.nft import NFT
from flowpolicy.finetuning.rules.ppo import PPO
from flowpolicy.finetuning.rules.rule import UpdateRule
from flowpolicy.finetuning.rules.tempflow import TempFlow
from flowpolicy.settings import build, choose

UPDATE_RULES: dict[str, type[UpdateRule]] = {rule.name: rule for rule in (PPO, NFT, AWM, TempFlow, GDRO)}
"""By name; a rule of one's own that is put here can be named in a configuration and is saved with a model."""


def build_update_rule(settings: Mapping[str, Any]) -> UpdateRule:
    """The rule that ``settings["name"]`` names, with the other settings.

    Raises:
        ConfigError: an unknown name, an unknown setting, or one out of range.
    """
    rule = choose(UPDATE_RULES, settings.get("name", PPO.name), "update.name")
    return build(rule, {key: value for key, value in settings.items() if key != "name"}, "update")
