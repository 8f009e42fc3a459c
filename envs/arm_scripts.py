"""Scripted arm motions: a list of stages, each a pose to reach and what the gripper does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import gymnasium as gym
import numpy as np

from flowpolicy_envs.rotations import axis_angle_from_matrix, matrix_from_axis_angle

OPEN, CLOSED = -1.0, 1.0
_STEP = 0.05  # m of travel asked for in one step at full speed
_TURN = 0.25  # rad of turn


@dataclass(frozen=True)
class Pose:
    """Where the hand is, or should be: position ``(3,)`` m and rotation ``(3, 3)``, in the world."""

    position: np.ndarray
    rotation: np.ndarray

    def turned(self, yaw: float) -> Pose:
        """The same place, turned by ``yaw`` rad about the vertical."""
        return Pose(self.position, matrix_from_axis_angle(np.array([0.0, 0.0, yaw])) @ self.rotation)

    def at(self, position: np.ndarray) -> Pose:
        """The same rotation in another place."""
        return Pose(np.asarray(position, dtype=np.float64), self.rotation)


class ArmEnv(Protocol):
    """What an environment offers to a script: where the hand is, and the action that sends it somewhere."""

    @property
    def hand(self) -> Pose:
        """The hand's pose now."""

    def command(self, pose: Pose, gripper: float) -> np.ndarray:
        """The action ``(A,)`` that asks for ``pose`` and for the gripper to open (-1) or close (1)."""


@dataclass(frozen=True)
class Stage:
    """One part of a motion.

    Attributes:
        target: the pose to reach, computed at each step, since objects move.
        gripper: what is asked of the gripper meanwhile.
        tolerance: m from the target at which the next stage begins.
        turn_tolerance: rad, likewise.
        wait: steps that the stage lasts at least; of a gripper that opens or closes.
        until: when the next stage begins, in place of the tolerances.
        while_true: what the stage relies on, such as a thing in the hand; lost, the script starts again.
    """

    target: Callable[[], Pose]
    gripper: float
    tolerance: float = 0.01
    turn_tolerance: float = 0.1
    wait: int = 0
    until: Callable[[], bool] | None = None
    while_true: Callable[[], bool] | None = None

    def is_sound(self) -> bool:
        """Whether what the stage relies on is there."""
        return self.while_true is None or self.while_true()

    def is_reached(self, travel: np.ndarray, turn: np.ndarray) -> bool:
        """Whether ``travel`` (m) and ``turn`` (rad), both ``(3,)``, are all that is left to the target."""
        if self.until is not None:
            return self.until()
        return bool(np.linalg.norm(travel) < self.tolerance and np.linalg.norm(turn) < self.turn_tolerance)


class ArmScript:
    """Plays stages one after another; an expert's ``reset`` sets them.

    Args:
        slowest: lowest speed, as a share of the fastest; an episode's speed is drawn between the two.
    """

    def __init__(self, slowest: float = 0.7) -> None:
        self.slowest = slowest
        self._plan: Callable[[], Sequence[Stage]] = lambda: ()
        self._stages: Sequence[Stage] = ()
        self._number = self._waited = 0
        self._speed = 1.0

    def play(self, plan: Callable[[], Sequence[Stage]], rng: np.random.Generator) -> None:
        """Start with the first stage of ``plan()``, at a speed drawn from ``rng``.

        Whenever the condition of a stage no longer holds, ``plan`` lists the stages again from the current
        state.
        """
        self._plan = plan
        self._start()
        self._speed = float(rng.uniform(self.slowest, 1.0))

    def _start(self) -> None:
        self._stages, self._number, self._waited = self._plan(), 0, 0

    def act(self, env: gym.Env[Any, Any], observation: Any) -> np.ndarray:
        """The next action: towards the present stage's target, no further than the speed allows."""
        arm = cast(ArmEnv, env.unwrapped)
        hand = arm.hand
        if not self._stages[self._number].is_sound():
            self._start()
        stage = self._stages[self._number]
        target = stage.target()
        travel = target.position - hand.position
        turn = axis_angle_from_matrix(target.rotation @ hand.rotation.T)
        is_last = self._number + 1 == len(self._stages)
        if not is_last and self._waited >= stage.wait and stage.is_reached(travel, turn):
            self._number, self._waited = self._number + 1, 0
            return self.act(env, observation)
        self._waited += 1
        travel, turn = _limited(travel, self._speed * _STEP), _limited(turn, self._speed * _TURN)
        rotation = matrix_from_axis_angle(turn) @ hand.rotation
        return arm.command(Pose(hand.position + travel, rotation), stage.gripper)


def _limited(vector: np.ndarray, longest: float) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    return vector if length <= longest else vector * (longest / length)
