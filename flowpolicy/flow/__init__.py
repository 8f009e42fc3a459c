"""Probability path, objectives, ODE solvers, grids and distributions of flow times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowpolicy.flow.flow_matching import FlowMatching
from flowpolicy.flow.mean_flow import MeanFlow
from flowpolicy.flow.mip import MIP
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Flow, Objective
from flowpolicy.flow.regression import Regression
from flowpolicy.flow.shortcut import Shortcut
from flowpolicy.settings import build, choose

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (FlowMatching, Shortcut, MeanFlow, Regression, MIP)
}


def build_objective(settings: Mapping[str, Any]) -> Objective:
    """An objective from a mapping with ``name`` and that objective's settings."""
    values = dict(settings)
    cls = choose(OBJECTIVES, str(values.pop("name", "")), "policy")
    return build(cls, values, "policy")


__all__ = [
    "MIP",
    "OBJECTIVES",
    "Draws",
    "Flow",
    "FlowMatching",
    "MeanFlow",
    "Network",
    "Objective",
    "Regression",
    "Shortcut",
    "build_objective",
]
