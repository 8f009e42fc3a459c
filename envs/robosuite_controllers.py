"""Controllers of robosuite's arms, as robosuite 1.5 describes them, for delta and absolute actions.

robomimic's files were recorded with robosuite 1.4 and before, where one controller stood for the whole robot
and displacements were meant in the world's frame; 1.5 has one for each part and calls the kind of action
``input_type``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from flowpolicy.errors import TaskError

_RENAMED = {"damping": "damping_ratio", "damping_limits": "damping_ratio_limits"}
_ARMS = ("right", "left")

# robosuite's operational-space controller of a hand's pose, with its usual gains.
_OSC_POSE: dict[str, Any] = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "input_type": "delta",
    "input_ref_frame": "world",
    "interpolation": None,
    "ramp_ratio": 0.2,
}


def arm_controllers(
    given: Mapping[str, Any] | None, robots: str | list[str], actions: str | None
) -> tuple[list[dict[str, Any]], bool]:
    """The composite controller of each robot, and whether actions are absolute.

    Args:
        given: what ``env_args`` say: robosuite 1.4's single controller, 1.5's composite one, or nothing.
        robots: their names, one arm each.
        actions: ``delta`` or ``absolute``; None leaves what is given.

    Raises:
        TaskError: no arm, or absolute actions of another controller than that of a hand's pose.
    """
    count = 1 if isinstance(robots, str) else len(robots)
    described = given if isinstance(given, (list, tuple)) else [given] * count
    composite = [_composite(one) for one in described]
    parts = [one["body_parts"][arm] for one in composite for arm in _ARMS if arm in one["body_parts"]]
    if not parts:
        raise TaskError(
            "The controller_configs of env_args have no arm; give each robot's 'right' or 'left'."
        )
    for part in parts:
        kind = actions or part.get("input_type", "delta")
        if kind == "absolute":
            if part["type"] != _OSC_POSE["type"]:
                raise TaskError(
                    f"Actions of a {part['type']} controller cannot be absolute poses; use OSC_POSE or delta."
                )
            part["input_ref_frame"] = "world"
        part["input_type"] = kind
    return composite, parts[0]["input_type"] == "absolute"


def _composite(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """One robot's controllers in 1.5's form, the arms beside the other parts."""
    if given is not None and "body_parts" in given:
        composite = copy.deepcopy(dict(given))
        composite["body_parts"] |= composite["body_parts"].pop("arms", {})
        return composite
    part = copy.deepcopy(_OSC_POSE)
    for name, value in copy.deepcopy(dict(given or {})).items():
        if name == "control_delta":
            part["input_type"] = "delta" if value else "absolute"
        else:
            part[_RENAMED.get(name, name)] = value
    part["gripper"] = {"type": "GRIP"}
    return {"type": "BASIC", "body_parts": {"right": part}}
