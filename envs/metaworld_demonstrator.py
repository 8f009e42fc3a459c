"""A scripted demonstrator of every Meta-World task, with several speeds and ways."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy.settings import require


class MetaWorldDemonstrator:
    """Meta-World's own scripted policy of each task, at a random speed and along one of three ways.

    The scripted policy drives the hand from where it stands. So that demonstrations show more than one way,
    the hand may first go around to the left or to the right: to a point beside the first third of its way to
    the object.

    Args:
        slowest: the speed of an episode is drawn from [slowest, 1] of the scripted one.
        detour: how far to the side the point lies, in m; 0 always goes straight.
    """

    REACHED = 0.02
    STEPS = 40

    def __init__(self, slowest: float = 0.8, detour: float = 0.06) -> None:
        require(0 < slowest <= 1, "scripted.settings.slowest", slowest, "in (0, 1]")
        require(detour >= 0, "scripted.settings.detour", detour, "at least 0")
        self.slowest, self.detour = slowest, detour

    def begin(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> str:
        """Choose the speed and the way."""
        from metaworld.policies import ENV_POLICY_MAP

        self._policy = ENV_POLICY_MAP[env.unwrapped.task]()
        self._speed = float(rng.uniform(self.slowest, 1.0))
        way = str(rng.choice(["straight", "left", "right"])) if self.detour > 0 else "straight"
        self._side = {"straight": 0.0, "left": 1.0, "right": -1.0}[way]
        self._via: np.ndarray | None = None
        self._left = 0 if way == "straight" else self.STEPS
        return way

    def act(self, env: gym.Env[Any, Any], observation: Any) -> np.ndarray:
        """The next action ``(4,)``."""
        seen = np.array(observation["observation"], dtype=np.float64)  # a copy: some policies write into it
        hand, target = seen[:3].copy(), seen[4:7].copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that commands are clipped, which is meant
            action = np.clip(self._policy.get_action(seen), -1.0, 1.0)
        if self._left > 0:
            if self._via is None:
                self._via = _beside(hand, target, self._side * self.detour)
            self._left -= 1
            if np.linalg.norm(self._via - hand) < self.REACHED:
                self._left = 0
            else:
                action[:3] = np.clip(10.0 * (self._via - hand), -1.0, 1.0)
        action[:3] *= self._speed
        return action


def _beside(hand: np.ndarray, target: np.ndarray, distance: float) -> np.ndarray:
    """The point at the hand's height, beside the first third of the way to the target; left is positive."""
    ahead = target[:2] - hand[:2]
    length = float(np.linalg.norm(ahead))
    ahead = ahead / length if length > 0.01 else np.array([0.0, 1.0])
    third = hand[:2] + (target[:2] - hand[:2]) / 3
    return np.array([*(third + distance * np.array([-ahead[1], ahead[0]])), hand[2]])
