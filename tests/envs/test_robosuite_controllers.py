"""Descriptions of controllers, old and new, come to the same thing."""

from __future__ import annotations

from typing import Any

import pytest

from flowpolicy.errors import TaskError
from flowpolicy_envs.robosuite_controllers import arm_controllers


def _arm(composite: list[dict[str, Any]], robot: int = 0) -> dict[str, Any]:
    return composite[robot]["body_parts"]["right"]


def test_old_descriptions_are_translated() -> None:
    old = {"type": "OSC_POSE", "control_delta": False, "kp": 99, "damping": 2}
    composite, absolute = arm_controllers(old, "Panda", None)
    assert absolute
    arm = _arm(composite)
    assert (arm["kp"], arm["damping_ratio"], arm["input_type"]) == (99, 2, "absolute")
    assert not {"damping", "control_delta"} & set(arm)
    assert arm["gripper"] == {"type": "GRIP"}
    # 1.4 meant displacements in the world's frame; 1.5 would mean the robot's base.
    assert (
        _arm(arm_controllers({**old, "control_delta": True}, "Panda", None)[0])["input_ref_frame"] == "world"
    )


@pytest.mark.parametrize("nested", [True, False])
def test_new_descriptions_are_kept_but_for_the_kind_of_action(nested: bool) -> None:
    part = {"type": "OSC_POSE", "input_type": "delta", "input_ref_frame": "base", "kp": 120}
    parts = {"arms": {"right": part}} if nested else {"right": part}
    given = {"type": "HYBRID", "body_parts": {**parts, "torso": {"type": "JOINT_POSITION"}}}
    composite, absolute = arm_controllers(given, "Panda", None)
    assert not absolute
    assert composite == [
        {"type": "HYBRID", "body_parts": {"right": part, "torso": {"type": "JOINT_POSITION"}}}
    ]
    composite, absolute = arm_controllers(given, "Panda", "absolute")
    assert absolute
    assert _arm(composite) == {**part, "input_type": "absolute", "input_ref_frame": "world"}
    assert part["input_type"] == "delta"  # what was given is left alone


def test_every_robot_gets_its_own() -> None:
    composite, _ = arm_controllers(None, ["Panda", "Panda"], "delta")
    assert len(composite) == 2
    assert _arm(composite, 0) == _arm(composite, 1)
    assert _arm(composite, 0) is not _arm(composite, 1)


def test_what_cannot_be_is_refused() -> None:
    joints = {"type": "BASIC", "body_parts": {"right": {"type": "JOINT_POSITION"}}}
    arm_controllers(joints, "Panda", None)
    with pytest.raises(TaskError, match="JOINT_POSITION controller cannot be absolute"):
        arm_controllers(joints, "Panda", "absolute")
    with pytest.raises(TaskError, match="have no arm"):
        arm_controllers({"type": "BASIC", "body_parts": {"base": {}}}, "Panda", None)
