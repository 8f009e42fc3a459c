"""Distillation methods by name. One file a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowpolicy.distillation.method import Method
from flowpolicy.distillation.methods.adversarial import Adversarial
from flowpolicy.distillation.methods.direct import Direct
from flowpolicy.distillation.methods.imitate import Imitate
from flowpolicy.distillation.methods.reflow import Reflow
from flowpolicy.distillation.methods.slimflow import SlimFlow
from flowpolicy.distillation.methods.transport import Transport
from flowpolicy.policy import FlowPolicy
from flowpolicy.settings import build, choose

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Adversarial, Direct, Imitate, Reflow, SlimFlow, Transport)
}
"""A method of one's own that is put here can be named in settings."""


def build_method(settings: Mapping[str, Any], teacher: FlowPolicy) -> Method:
    """The method that ``settings["name"]`` names, with the other settings.

    Raises:
        ConfigError: an unknown name or setting, one out of range, or a teacher that is no flow.
    """
    values = dict(settings)
    cls = choose(METHODS, str(values.pop("name", "")), "method")
    return build(cls, {**values, "teacher": teacher}, "method")
