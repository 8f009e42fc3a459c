"""robosuite tasks (Zhu et al. 2020) through robomimic's environment, with Gymnasium's interface.

A task is described by robomimic's ``env_args``, as in its HDF5 files, so that a policy is evaluated in the
environment that its demonstrations name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy.data.importers.hdf5 import child, json_attribute, open_hdf5
from flowpolicy.errors import TaskError
from flowpolicy.evaluation.rendering import choose_gl_backend
from flowpolicy.settings import require
from flowpolicy_envs.arm_scripts import Pose
from flowpolicy_envs.robomimic_compat import environment_names, register_image_keys, robosuite_class
from flowpolicy_envs.robosuite_controllers import arm_controllers
from flowpolicy_envs.rotations import (
    absolute_action_6d,
    absolute_action_axis_angle,
    axis_angle_from_matrix,
    with_rotation_6d,
)

_REACH = 3.0  # m: no absolute target lies farther from the world's origin
_VIDEO_SIZE = (256, 256)


class RobosuiteTask(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """One robosuite task. Success ends an episode; the reward is 1 then and 0 before, unless ``env_args`` ask
    for robosuite's ``reward_shaping``.

    Observations: every vector that robomimic keeps (``object``, ``robot0_eef_pos``, ``robot0_eef_quat``,
    ``robot0_gripper_qpos``, ...) as float32, with ``rotation_6d`` also ``robot0_eef_rot6d``, and for each
    camera ``<camera>_image``, uint8 ``(size, size, 3)``.

    Actions of each arm, one after the other: a displacement of the hand, scaled to [-1, 1] (``delta``), or
    its pose in the world, m and rad (``absolute``), three numbers of position and three of axis times angle,
    or six with ``rotation_6d`` in absolute actions; then the gripper, -1 opens and 1 closes.

    Args:
        env_args: ``env_name``, ``type`` and ``env_kwargs`` (keyword arguments of robosuite).
        dataset: a robomimic HDF5 file whose ``env_args`` are used instead.
        actions: ``delta`` or ``absolute``; None leaves what ``env_args`` say, delta where they say nothing.
        rotation_6d: orientations as six continuous numbers (Zhou et al. 2019).
        cameras: whose images are observed.
        image_size: their height and width.
        render_mode: ``rgb_array`` or None.

    Raises:
        TaskError: neither or both of ``env_args`` and ``dataset``, or one that robosuite cannot make.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        env_args: Mapping[str, Any] | None = None,
        dataset: str | None = None,
        actions: str | None = None,
        rotation_6d: bool = False,
        cameras: Sequence[str] = (),
        image_size: int = 84,
        render_mode: str | None = None,
    ) -> None:
        require(actions in (None, "delta", "absolute"), "actions", actions, "delta, absolute or null")
        if (env_args is None) == (dataset is None):
            raise TaskError("A robosuite task is described by env_args or by a dataset; give one of the two.")
        described = dict(env_args) if env_args is not None else env_args_of(str(dataset))
        is_drawn = bool(cameras) or render_mode is not None
        if is_drawn:
            choose_gl_backend()  # robosuite decides which OpenGL to use when it is imported
        self.render_mode = render_mode
        self.rotation_6d = rotation_6d
        self.cameras = tuple(cameras)
        self._robomimic, self.absolute = _make(described, actions, self.cameras, image_size, is_drawn)
        self.simulator = self._robomimic.env
        self.dt = 1.0 / self.simulator.control_freq
        self.metadata = {**self.metadata, "render_fps": round(1 / self.dt)}
        low, high = self.simulator.action_spec
        if self.absolute:
            arms = len(low) // 7
            bound = np.tile(np.concatenate([np.full(3, _REACH), np.full(3, np.pi), [1.0]]), arms)
            if rotation_6d:
                bound = np.tile(np.concatenate([np.full(3, _REACH), np.ones(6), [1.0]]), arms)
            low, high = -bound, bound
        self.action_space = gym.spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self.observation_space = gym.spaces.Dict(
            {key: _space_of(value) for key, value in self.observe().items()}
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode, which depends on its seed alone.

        ``options={"states": (n,)}`` starts from a recorded state of the simulator instead of a random one.
        """
        super().reset(seed=seed)
        # The arm's pose, the objects' places and orientations are all drawn from one generator, which
        # samplers and objects share: its state is set, for a new generator would not reach them.
        generator = self.simulator.rng.bit_generator
        generator.state = self.np_random.bit_generator.state
        self._robomimic.reset()
        self.np_random.bit_generator.state = generator.state
        states = (options or {}).get("states")
        if states is not None:
            self.set_states(np.asarray(states))
        return self.observe(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Apply one action ``(A,)`` for ``dt`` seconds."""
        applied = np.clip(np.asarray(action, np.float64), self.action_space.low, self.action_space.high)
        if self.absolute and self.rotation_6d:
            applied = absolute_action_axis_angle(applied)
        raw, shaped, _, _ = self._robomimic.step(applied)
        success = self.is_success()
        is_shaped = getattr(self.simulator, "reward_shaping", False)
        reward = float(shaped) if is_shaped else float(success)
        return self._observation(raw), reward, success, False, {"success": success}

    def observe(self) -> dict[str, np.ndarray]:
        """The observation in the simulator's present state."""
        return self._observation(self._robomimic.get_observation())

    def set_states(self, states: np.ndarray) -> None:
        """Put the simulator into a recorded state ``(n,)``: time, positions, velocities.

        Raises:
            TaskError: a state of another model.
        """
        expected = self.simulator.sim.get_state().flatten().shape
        if states.shape != expected:
            raise TaskError(
                f"A recorded state has shape {states.shape} and {type(self.simulator).__name__} has "
                f"{expected}; choose the task and robot of the recording."
            )
        self._robomimic.reset_to({"states": np.asarray(states, np.float64)})

    def is_success(self) -> bool:
        """Whether the task is done in the present state."""
        return bool(self._robomimic.is_success()["task"])

    def render(self) -> np.ndarray | None:
        """A picture ``(256, 256, 3)`` uint8 from the task's usual camera."""
        if self.render_mode is None:
            return None
        height, width = _VIDEO_SIZE
        frame: np.ndarray = self._robomimic.render("rgb_array", height, width, "agentview")
        return frame

    def close(self) -> None:
        """Free the simulator."""
        self.simulator.close()

    @property
    def hand(self) -> Pose:
        """The first arm's hand, in the frame of its controller."""
        controller = self._controller
        return Pose(np.array(controller.ref_pos), np.array(controller.ref_ori_mat))

    def command(self, pose: Pose, gripper: float) -> np.ndarray:
        """The action that asks the first arm for ``pose`` in the world, and the gripper to open or close."""
        if self.absolute:
            rotation = axis_angle_from_matrix(pose.rotation)
            action = np.concatenate([pose.position, rotation, [gripper]])
            return absolute_action_6d(action) if self.rotation_6d else action
        hand, largest = self.hand, self._controller.output_max
        change = np.concatenate(
            [pose.position - hand.position, axis_angle_from_matrix(pose.rotation @ hand.rotation.T)]
        )
        return np.append(np.clip(change / largest, -1.0, 1.0), gripper)

    @property
    def _controller(self) -> Any:
        robot = self.simulator.robots[0]
        controller = robot.part_controllers[robot.arms[0]]
        controller.update(force=True)
        return controller

    def _observation(self, raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
        images = {f"{camera}_image" for camera in self.cameras}
        seen = {
            key: np.ascontiguousarray(value, np.uint8 if key in images else np.float32)
            for key, value in raw.items()
        }
        return with_rotation_6d(seen) if self.rotation_6d else seen


def env_args_of(dataset: str) -> dict[str, Any]:
    """The ``env_args`` of a robomimic HDF5 file.

    Raises:
        DataError: no such file, or not robomimic's.
        TaskError: it does not say which environment it is of.
    """
    path = Path(dataset).expanduser()
    with open_hdf5(path) as file:
        found = json_attribute(child(file, "data", path), "env_args", path)
    if not isinstance(found, dict) or "env_name" not in found:
        raise TaskError(
            f"{path} has no 'env_args' that name an environment; describe it by env_args instead."
        )
    return found


def _make(
    described: Mapping[str, Any], actions: str | None, cameras: Sequence[str], size: int, is_drawn: bool
) -> tuple[Any, bool]:
    """robomimic's environment, and whether its actions are absolute."""
    made = robosuite_class()
    name = described.get("env_name")
    if name not in environment_names():
        raise TaskError(
            f"env_args.env_name is '{name}'; robosuite has {', '.join(sorted(environment_names()))}."
        )
    settings = copy.deepcopy(dict(described.get("env_kwargs") or {}))
    for replaced in ("has_renderer", "has_offscreen_renderer", "use_camera_obs", "camera_depths"):
        settings.pop(replaced, None)
    robots = settings.setdefault("robots", "Panda")
    settings["controller_configs"], absolute = arm_controllers(
        settings.get("controller_configs"), robots, actions
    )
    settings.setdefault("control_freq", 20)
    settings.setdefault("hard_reset", False)  # a model that is built once; a reset takes 0.04 s and not 2
    settings["seed"] = 0  # of what is drawn when the model is built, such as an object's size
    settings |= {"camera_names": list(cameras) or "agentview", "camera_heights": size, "camera_widths": size}
    register_image_keys([f"{camera}_image" for camera in cameras])
    try:
        env = made(
            name,
            render_offscreen=is_drawn,
            use_image_obs=bool(cameras),
            postprocess_visual_obs=False,
            **settings,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise TaskError(f"robosuite cannot make '{name}' ({error}); fix env_args.") from error
    if is_drawn:
        _without_shadows(env.env)
    return env, absolute


def _without_shadows(simulator: Any) -> None:
    """Shadows, reflections and multisampling take most of the time of a small picture; data and evaluation do
    without.
    """
    import mujoco

    context = simulator.sim._render_context_offscreen
    quality = simulator.sim.model._model.vis.quality
    quality.offsamples, quality.shadowsize = 0, 256
    context._set_mujoco_context_and_buffers()
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        context.scn.flags[flag] = 0


def _space_of(value: np.ndarray) -> gym.spaces.Box:
    if value.dtype == np.uint8:
        return gym.spaces.Box(0, 255, value.shape, np.uint8)
    return gym.spaces.Box(-np.inf, np.inf, value.shape, np.float32)
