"""Push-T: the agent's position with nine keypoints of the block, all in pixels; or with an image.

One function computes the observation from the pose, for recorded demonstrations and for the environment
alike. Task and demonstrations: Chi et al. 2023, "Diffusion Policy"; simulator: gym-pusht (pymunk).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy.errors import DataError, TaskError

SUCCESS_COVERAGE = 0.95

# The nine keypoints in the block's own frame, px. Derived from the 206 recorded human episodes: the median
# over all frames with the block at rest of R(-angle) (keypoint - block position); over those 12,634 frames
# each coordinate's standard deviation is below 1e-5 px.
BLOCK_KEYPOINTS = np.array(
    [
        [9.26979, 90.04097],
        [-60.98347, -1.18673],
        [60.91276, -1.39336],
        [-0.27050, 25.54363],
        [-14.06493, 122.81585],
        [39.00274, 32.85740],
        [-39.96641, 32.72966],
        [-16.82434, 62.86318],
        [23.54146, -1.70029],
    ]
)


def keypoints_from_state(state: np.ndarray) -> np.ndarray:
    """The observation that belongs to a pose.

    Args:
        state: ``(N, 5)`` agent x, y, block x, y in px and block angle in rad.

    Returns:
        ``(N, 20)`` float32: agent x, y, then x, y of each block keypoint, px.

    Raises:
        DataError: a state of another shape.
    """
    state = np.asarray(state, dtype=np.float64)
    if state.ndim != 2 or state.shape[1] != 5:
        raise DataError(
            f"A Push-T state has shape {state.shape}; it must be (steps, 5): agent x, y, block x, y, angle."
        )
    cosine, sine = np.cos(state[:, 4:5]), np.sin(state[:, 4:5])
    x = state[:, 2:3] + cosine * BLOCK_KEYPOINTS[:, 0] - sine * BLOCK_KEYPOINTS[:, 1]
    y = state[:, 3:4] + sine * BLOCK_KEYPOINTS[:, 0] + cosine * BLOCK_KEYPOINTS[:, 1]
    keypoints = np.stack([x, y], axis=-1).reshape(len(state), -1)
    return np.concatenate([state[:, :2], keypoints], axis=1).astype(np.float32)


def add_keypoint_observation(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The demonstrations' arrays with ``observation`` ``(steps, 20)`` computed from ``state`` ``(steps, 5)``.

    Raises:
        DataError: demonstrations without ``state``.
    """
    if "state" not in arrays:
        raise DataError(
            f"Push-T demonstrations need the key 'state' and have {', '.join(sorted(arrays))}; "
            "use the original store."
        )
    return {**arrays, "observation": keypoints_from_state(arrays["state"])}


def name_image_observation(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The demonstrations' arrays with ``image`` ``(steps, 96, 96, 3)`` and ``agent_position`` ``(steps, 2)``.

    The recorded images are those that :class:`PushTImages` draws of the recorded states.

    Raises:
        DataError: demonstrations without ``img`` and ``state``.
    """
    for key in ("img", "state"):
        if key not in arrays:
            raise DataError(
                f"Push-T demonstrations with images need the key '{key}' and have "
                f"{', '.join(sorted(arrays))}; use the original store."
            )
    rest = {key: value for key, value in arrays.items() if key != "img"}
    return {**rest, "image": arrays["img"], "agent_position": arrays["state"][:, :2].astype(np.float32)}


class PushTKeypoints(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Gym-pusht with the keypoint observation ``(20,)`` and actions ``(2,)``: a target in 0 to 512 px.

    ``info`` holds ``coverage`` (share of the goal covered by the block), ``success`` (coverage > 0.95; ends
    the episode) and ``score`` = min(1, coverage / 0.95); its maximum over an episode is the published metric.

    Args:
        env: gym-pusht's.
        goal_degrees: how far the goal is turned about the middle of the table from where it is published.
    """

    def __init__(self, env: gym.Env[Any, Any], goal_degrees: float = 0.0) -> None:
        super().__init__(env)
        self._turn = np.deg2rad(goal_degrees)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (20,), np.float32)

    @property
    def state(self) -> np.ndarray:
        """The pose ``(5,)``: agent x, y, block x, y in px, block angle in rad in [0, 2 pi)."""
        return np.asarray(self.unwrapped.get_obs(), dtype=np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode, from a random pose or from ``options={"state": (5,)}``.

        Raises:
            TaskError: a state of another shape or with values that are not finite.
        """
        options = dict(options or {})
        state = options.pop("state", None)
        _, info = self.env.reset(seed=seed, options=options or None)
        if self._turn:  # the simulator puts the goal, which is in the middle, where it is published
            self.unwrapped.goal_pose = self.unwrapped.goal_pose + np.array([0.0, 0.0, self._turn])
            info = {**info, "goal_pose": self.unwrapped.goal_pose.copy()}
        if state is not None:
            self._set_state(np.asarray(state, dtype=np.float64))
        return self._observation(), self._judged(info, float(self.unwrapped._get_coverage()))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the agent towards ``action`` ``(2,)`` px for 0.1 s."""
        target = np.clip(np.asarray(action, dtype=np.float64), 0.0, 512.0)
        _, reward, terminated, truncated, info = self.env.step(target)
        return (
            self._observation(),
            float(reward),
            bool(terminated),
            bool(truncated),
            self._judged(info, float(info["coverage"])),
        )

    def _set_state(self, state: np.ndarray) -> None:
        if state.shape != (5,) or not np.isfinite(state).all():
            raise TaskError(
                f"The Push-T start state is {state.tolist()}; "
                "it must be five finite numbers: agent x, y, block x, y, angle."
            )
        simulator = self.unwrapped
        simulator.agent.position = tuple(state[:2])
        # A turn is about the centre of mass, which is not the block's origin, so it moves the block:
        # the angle comes first and the position corrects it.
        simulator.block.angle = float(state[4])
        simulator.block.position = tuple(state[2:4])
        simulator.space.step(simulator.dt)

    def _observation(self) -> np.ndarray:
        return np.asarray(keypoints_from_state(self.state[None])[0])

    def _judged(self, info: dict[str, Any], coverage: float) -> dict[str, Any]:
        score = min(1.0, coverage / SUCCESS_COVERAGE)
        return {**info, "coverage": coverage, "score": score, "success": coverage > SUCCESS_COVERAGE}


class PushTImages(gym.ObservationWrapper[dict[str, np.ndarray], np.ndarray, np.ndarray]):
    """The same task from camera images: ``image`` ``(96, 96, 3)`` uint8, ``agent_position`` ``(2,)`` px."""

    def __init__(self, env: PushTKeypoints) -> None:
        super().__init__(env)
        simulator = env.unwrapped
        shape = (simulator.observation_height, simulator.observation_width, 3)
        self.observation_space = gym.spaces.Dict(
            {
                "image": gym.spaces.Box(0, 255, shape, np.uint8),
                "agent_position": gym.spaces.Box(0.0, 512.0, (2,), np.float32),
            }
        )

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        """Keypoints ``(20,)`` to an image and the agent's position."""
        image = np.asarray(self.unwrapped._render(), dtype=np.uint8)
        return {"image": image, "agent_position": observation[:2]}


def make_push_t(render_mode: str | None = None, goal_degrees: float = 0.0, **kwargs: Any) -> PushTKeypoints:
    """Entry point of ``flowpolicy/PushT-v0``; further keyword arguments go to gym-pusht."""
    from gym_pusht.envs import PushTEnv

    return PushTKeypoints(PushTEnv(obs_type="state", render_mode=render_mode, **kwargs), goal_degrees)


def make_push_t_images(render_mode: str | None = "rgb_array", **kwargs: Any) -> PushTImages:
    """Entry point of ``flowpolicy/PushTImages-v0``; it renders whatever ``render_mode`` is asked for."""
    return PushTImages(make_push_t(render_mode=render_mode or "rgb_array", **kwargs))
