"""Losses on preferences by name. One file a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowpolicy.policy import FlowPolicy
from flowpolicy.preferences.loss import PreferenceLoss
from flowpolicy.preferences.losses.flow_dpo import FlowDPO
from flowpolicy.preferences.losses.flow_rwr import FlowRWR
from flowpolicy.settings import build, choose

LOSSES: dict[str, type[PreferenceLoss]] = {cls.name: cls for cls in (FlowDPO, FlowRWR)}
"""A loss of one's own that is put here can be named in settings."""


def build_loss(settings: Mapping[str, Any], reference: FlowPolicy) -> PreferenceLoss:
    """The loss that ``settings["name"]`` names, with the other settings.

    Raises:
        ConfigError: an unknown name or setting, one out of range, or a policy that is no flow.
    """
    values = dict(settings)
    cls = choose(LOSSES, str(values.pop("name", "")), "loss")
    return build(cls, {**values, "reference": reference}, "loss")
