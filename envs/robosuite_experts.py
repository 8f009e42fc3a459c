"""Scripted experts of robosuite's Lift, PickPlaceCan and NutAssemblySquare.

Each executes stages computed from the objects' poses. What an episode chooses at random (a way among
several, heights, the speed) comes from its seed, so that the demonstrations have several modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy_envs.arm_scripts import CLOSED, OPEN, ArmScript, Pose, Stage
from flowpolicy_envs.rotations import matrix_from_axis_angle

_QUARTER = np.pi / 2
_CLOSING = 6  # steps until the fingers hold
_OPENING = 4
_TURNS = (-1.8, 3.2)  # rad that the wrist can turn from where a robosuite Panda starts
_BEYOND = 0.5  # cosine between a direction and the one away from the robot
_OVER_PEG = 0.005  # m
_AROUND_PEG = 0.03  # m from the peg, within which a nut that is down must be around it
_IN_HAND = 0.03  # m between the hand and the handle


class LiftExpert(ArmScript):
    """Grasps the cube from above and raises it; two ways: the wrist as it is, or turned by a quarter."""

    def reset(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> str:
        """Choose the way and the height from which the hand comes down."""
        arm: Any = env.unwrapped
        simulator = arm.simulator
        way, wrist = _wrist(arm, rng)
        clear = rng.uniform(0.06, 0.10)

        def above_cube(by: float) -> Pose:
            return wrist.at(_up(simulator.sim.data.body_xpos[simulator.cube_body_id], by))

        raised = above_cube(0.15)
        stages = [
            *_grasp(above_cube, clear, tolerance=0.008),
            Stage(lambda: raised, CLOSED),
        ]
        self.play(lambda: stages, rng)
        return way


class CanExpert(ArmScript):
    """Carries the can to its bin; two ways: the wrist as it is, or turned by a quarter."""

    def reset(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> str:
        """Choose the way and the height of the path."""
        arm: Any = env.unwrapped
        simulator = arm.simulator
        way, wrist = _wrist(arm, rng)
        body = simulator.obj_body_id[simulator.obj_to_use]
        # Short of the middle of the can's quarter of the bin, which is where the arm's reach ends.
        goal = np.array(simulator.target_bin_placements[simulator.object_id]) - np.array([0.05, 0.06, 0.0])
        clear = rng.uniform(0.10, 0.14)
        carried = clear + 0.10

        def above_can(by: float) -> Pose:
            return wrist.at(_up(simulator.sim.data.body_xpos[body], by))

        raised = above_can(carried)
        stages = [
            *_grasp(above_can, clear, at=0.01, tolerance=0.01),
            Stage(lambda: raised, CLOSED, tolerance=0.03),
            Stage(lambda: wrist.at(_up(goal, 0.06 + carried)), CLOSED, tolerance=0.03),
            Stage(lambda: wrist.at(_up(goal, 0.12)), CLOSED, tolerance=0.03),
            Stage(lambda: wrist.at(_up(goal, 0.12)), OPEN, tolerance=0.1, wait=_OPENING),
            Stage(lambda: wrist.at(_up(goal, 0.06 + carried)), OPEN),
        ]
        self.play(lambda: stages, rng)
        return way


class SquareExpert(ArmScript):
    """Grasps the square nut by its handle and puts it on the peg; two ways: carried low or high."""

    def reset(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> str:
        """Choose the way and the height from which the hand comes down."""
        arm: Any = env.unwrapped
        scene = _NutAndPeg(arm)
        way = str(rng.choice(["low", "high"]))
        # The peg ends 0.13 above the table; much higher than that the arm does not reach over it.
        carried = scene.table + (0.16 if way == "low" else 0.20)
        clear = rng.uniform(0.06, 0.10)
        upright = arm.hand
        self.play(lambda: _nut_stages(scene, upright, clear, carried), rng)
        return way


class _NutAndPeg:
    """Where the square nut, its handle, the peg and the table are."""

    def __init__(self, arm: Any) -> None:
        simulator = arm.simulator
        nut = simulator.nuts[simulator.nut_id]
        self.arm, self._data = arm, simulator.sim.data
        self._body = simulator.obj_body_id[nut.name]
        self._handle = simulator.sim.model.site_name2id(nut.important_sites["handle"])
        self.peg = np.array(self._data.body_xpos[simulator.peg1_body_id])
        self.table = float(simulator.table_offset[2])

    @property
    def nut(self) -> Pose:
        """The nut's pose."""
        data, body = self._data, self._body
        return Pose(np.array(data.body_xpos[body]), np.array(data.body_xmat[body]).reshape(3, 3))

    @property
    def handle(self) -> np.ndarray:
        """The middle of the nut's handle, ``(3,)`` m."""
        return np.array(self._data.site_xpos[self._handle])

    @property
    def off_peg(self) -> float:
        """Horizontal distance of the hole from the peg, m."""
        return float(np.linalg.norm(self.nut.position[:2] - self.peg[:2]))

    def is_handle_in_hand(self) -> bool:
        """Whether the hand is where the handle is; the fingers are not looked at."""
        return bool(np.linalg.norm(self.handle - self.arm.hand.position) < _IN_HAND)

    def is_on_peg(self) -> bool:
        """Whether the nut is down around the peg."""
        return bool(self.nut.position[2] < self.table + 0.06 and self.off_peg < _AROUND_PEG)


def _nut_stages(scene: _NutAndPeg, upright: Pose, clear: float, carried: float) -> list[Stage]:
    """From where the nut is now, which after a slip may still be falling; it is then fetched again.

    The wrist turns no more than it must, to the handle and then to the peg.
    """
    arm, table, peg = scene.arm, scene.table, scene.peg
    start = scene.nut
    along = _heading(scene.handle - start.position)
    at_handle, to_peg = _turns(_yaw(upright.rotation), along, _yaw(start.rotation))
    wrist = upright.turned(at_handle)
    held = scene.is_handle_in_hand

    def over_peg(height: float) -> Pose:
        """The hand's pose that brings the nut, as it is held now, to ``height`` over the peg."""
        nut, hand = scene.nut, arm.hand
        goal = _about_vertical(_yaw(start.rotation) + to_peg)
        change = goal @ nut.rotation.T
        place = np.array([peg[0], peg[1], height])
        return Pose(place + change @ (hand.position - nut.position), change @ hand.rotation)

    def onto_peg() -> Pose:
        """Down, but only where the hole is over the peg; the gap between them is 7 mm."""
        is_around = scene.nut.position[2] < table + 0.125
        return over_peg(table + 0.02 if is_around or scene.off_peg < _OVER_PEG else carried)

    def raised() -> Pose:
        return wrist.at(np.append(arm.hand.position[:2], carried))

    return [
        *_grasp(lambda by: wrist.at(_up(scene.handle, by)), clear, tolerance=0.006, clear_tolerance=0.012),
        Stage(raised, CLOSED, tolerance=0.03, while_true=held),
        Stage(lambda: over_peg(carried), CLOSED, tolerance=0.015, while_true=held),
        Stage(onto_peg, CLOSED, until=scene.is_on_peg, while_true=held),
        Stage(lambda: arm.hand, OPEN, wait=_OPENING),
        Stage(lambda: arm.hand.at(_up(arm.hand.position, 0.05)), OPEN),
    ]


def _grasp(
    above: Callable[[float], Pose],
    clear: float,
    *,
    at: float = 0.0,
    tolerance: float,
    clear_tolerance: float = 0.015,
) -> list[Stage]:
    """Open over a thing, down to it, and close; ``above`` is the hand's pose so many m above it."""
    return [
        Stage(lambda: above(clear), OPEN, tolerance=clear_tolerance),
        Stage(lambda: above(at), OPEN, tolerance=tolerance),
        Stage(lambda: above(at), CLOSED, tolerance=0.03, wait=_CLOSING),
    ]


def _turns(hand: float, handle: float, nut: float) -> tuple[float, float]:
    """How far the wrist turns to the nut's handle, and from there to the peg; rad about the vertical.

    The fingers close along the first axis of the hand, which crosses the handle from either side; the nut
    fits the peg in four ways. Of these eight, those are left out that the last joint cannot reach, or that
    put the hand beyond the peg, where the arm ends; the least turning of the rest is taken.
    """
    best = None
    for half in (-1, 0, 1):
        for quarter in range(-2, 2):
            at_handle = _nearest(handle - hand + _QUARTER, np.pi) + half * np.pi
            to_peg = _nearest(-nut, _QUARTER) + quarter * _QUARTER
            is_beyond = np.cos(handle + to_peg) > _BEYOND
            reachable = all(_TURNS[0] < turn < _TURNS[1] for turn in (at_handle, at_handle + to_peg))
            cost = abs(at_handle) + abs(to_peg)
            if reachable and not is_beyond and (best is None or cost < best[0]):
                best = cost, at_handle, to_peg
    assert best is not None  # some quarter always fits: the last joint has almost two turns
    return best[1], best[2]


def _wrist(arm: Any, rng: np.random.Generator) -> tuple[str, Pose]:
    """One of two grasps of a rotationally symmetric object."""
    way = str(rng.choice(["straight", "turned"]))
    return way, arm.hand.turned(_QUARTER if way == "turned" else 0.0)


def _up(place: np.ndarray, by: float) -> np.ndarray:
    return np.asarray(place) + np.array([0.0, 0.0, by])


def _about_vertical(yaw: float) -> np.ndarray:
    return matrix_from_axis_angle(np.array([0.0, 0.0, yaw]))


def _heading(direction: np.ndarray) -> float:
    return float(np.arctan2(direction[1], direction[0]))


def _yaw(rotation: np.ndarray) -> float:
    """The heading of the first axis."""
    return _heading(rotation[:, 0])


def _nearest(angle: float, period: float) -> float:
    """The smallest turn that equals ``angle`` up to a multiple of ``period``."""
    return float((angle + period / 2) % period - period / 2)
