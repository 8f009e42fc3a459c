"""What the environments' tests share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from flowpolicy.evaluation.rendering import choose_gl_backend


@pytest.fixture(scope="session")
def models_compiled_once() -> Iterator[None]:
    """Every environment of robosuite compiles its model, and before it its arm, only to look things up in it:
    of a task the same each time, for half a second each."""
    choose_gl_backend()
    mujoco = pytest.importorskip("mujoco")
    robots = pytest.importorskip("robosuite.models.robots", reason="robosuite is not installed")
    simulation = pytest.importorskip("robosuite.utils.binding_utils").MjSim
    compiled = cache(mujoco.MjModel.from_xml_string)

    def get_model(self: Any) -> Any:
        return compiled(self.get_xml())

    def from_xml_string(xml: str) -> Any:
        return simulation(copy.copy(compiled(xml)))  # an environment may change its own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robots.RobotModel, "get_model", get_model)
        patch.setattr(simulation, "from_xml_string", from_xml_string)
        yield
