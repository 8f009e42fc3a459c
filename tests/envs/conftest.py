"""What the environments' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from flowpolicy.evaluation.rendering import choose_gl_backend


@pytest.fixture(scope="session")
def arms_compiled_once() -> Iterator[None]:
    """Every environment of robosuite compiles its arm by itself first, only to look things up in it: the same
    each time, for half a second."""
    choose_gl_backend()
    mujoco = pytest.importorskip("mujoco")
    models = pytest.importorskip("robosuite.models.robots", reason="robosuite is not installed")
    compiled = cache(mujoco.MjModel.from_xml_string)

    def get_model(self: Any) -> Any:
        return compiled(self.get_xml())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.RobotModel, "get_model", get_model)
        yield
