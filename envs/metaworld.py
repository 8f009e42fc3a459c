"""Meta-World (Yu et al. 2019, version 3): a Sawyer arm and 50 tasks, and their scripted experts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy.settings import choose, require

OBSERVATION_SIZE = 39
SEEDS = 2**31
REMEMBERED = (bool, int, float, np.generic, np.ndarray, list, type(None))
VIEW = ("render_mode", "camera_name", "camera_id", "width", "height")


class MetaWorld(gym.Env[Any, np.ndarray]):
    """One task of Meta-World, or several in turn.

    An observation is a float32 vector ``(39,)``: hand position (m), opening of the gripper, positions and
    orientations of up to two objects, all of this as it was a step earlier, and the goal's position.
    With ``tasks`` it is a dictionary of that ``observation`` and of ``task``, one-hot ``(len(tasks),)``, and
    ``info["task"]`` is the name.
    An action ``(4,)`` in [-1, 1] moves the hand by up to 1 cm a coordinate, and closes (1) or opens (-1) the
    gripper.

    The places of objects and goal are drawn at each reset. ``reset(seed=s)`` determines them, and starts
    ``tasks[s % len(tasks)]``; a reset without seed goes on to the next task. An episode ends with success.

    Args:
        task: name of the only task, such as ``push-v3``.
        tasks: names of several, instead.
        reward: ``sparse`` is 1 at success and 0 elsewhere; ``dense`` is Meta-World's own, 0 to 10.
        render_mode: None or ``rgb_array``.
        camera: Meta-World's name of the camera: corner, corner2, corner3, topview, behindGripper, gripperPOV.
        size: width and height of a rendered image.

    Raises:
        ConfigError: an unknown task, both of ``task`` and ``tasks`` or neither, or an unknown reward.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 - gymnasium's convention

    def __init__(
        self,
        task: str | None = None,
        tasks: Sequence[str] | None = None,
        reward: str = "sparse",
        render_mode: str | None = None,
        camera: str = "corner2",
        size: int = 320,
    ) -> None:
        require((task is None) != (tasks is None), "env.env_kwargs.tasks", tasks, "given instead of task")
        require(reward in ("sparse", "dense"), "env.env_kwargs.reward", reward, "sparse or dense")
        self.tasks = (task,) if task is not None else tuple(tasks or ())
        require(len(self.tasks) >= 1, "env.env_kwargs.tasks", tasks, "a list of at least one task")
        require(len(set(self.tasks)) == len(self.tasks), "env.env_kwargs.tasks", tasks, "without repetitions")
        self.reward = reward
        self.render_mode = render_mode
        self._view = {"render_mode": render_mode, "camera_name": camera, "width": size, "height": size}
        self._names_task = tasks is not None
        self._simulators: dict[str, _Simulator] = {}
        self._number = self._started = 0
        box = gym.spaces.Box(-np.inf, np.inf, (OBSERVATION_SIZE,), np.float32)
        token = gym.spaces.Box(0.0, 1.0, (len(self.tasks),), np.float32)
        self.observation_space: gym.Space[Any] = box
        if self._names_task:
            self.observation_space = gym.spaces.Dict({"observation": box, "task": token})
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        for name in self.tasks:
            _environment_class(name)

    @property
    def task(self) -> str:
        """Name of the current task."""
        return self.tasks[self._number]

    @property
    def dt(self) -> float:
        """Seconds of a step."""
        return float(self._simulator.env.dt)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Start an episode of the task that the seed names, or of the next one."""
        super().reset(seed=seed)
        following = self._started + 1 if self._simulators else 0
        self._number = self._started = (following if seed is None else seed) % len(self.tasks)
        observation = self._simulator.restart(int(self.np_random.integers(SEEDS)))
        return self._observed(observation), {"success": False, **self._named()}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Move the hand by ``action`` ``(4,)``, clipped to [-1, 1], for one eightieth of a second."""
        bounded = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        observation, dense, _, _, info = self._simulator.env.step(bounded)
        success = bool(info["success"])
        reward = float(dense) if self.reward == "dense" else float(success)
        info = {**info, "success": success, **self._named()}
        return self._observed(observation), reward, success, False, info

    def clone_state(self) -> Any:
        """Where the episode stands, for :meth:`restore_state` of any environment of these tasks."""
        return self._number, self._simulator.clone_state()

    def restore_state(self, state: Any) -> None:
        """Go on from there; the next reset is this environment's own."""
        self._number, own = state
        self._simulator.restore_state(own)

    def render(self) -> Any:
        """An image ``(size, size, 3)``, uint8, the right way up."""
        simulator = self._simulator.env
        image = simulator.render()
        # Some of the cameras hang upside down: the second column of the frame is where their top points.
        is_upside_down = simulator.data.camera(self._view["camera_name"]).xmat.reshape(3, 3)[2, 1] < 0
        return np.ascontiguousarray(image[::-1, ::-1]) if is_upside_down and image is not None else image

    def close(self) -> None:
        """Free the simulators."""
        for simulator in self._simulators.values():
            simulator.env.close()
        self._simulators.clear()

    @property
    def _simulator(self) -> _Simulator:
        if self.task not in self._simulators:  # a simulator takes a moment and memory: only for tasks in use
            self._simulators[self.task] = _Simulator(self.task, self._view)
        return self._simulators[self.task]

    def _named(self) -> dict[str, str]:
        return {"task": self.task} if self._names_task else {}

    def _observed(self, observation: np.ndarray) -> Any:
        vector = observation.astype(np.float32)
        if not self._names_task:
            return vector
        token = np.zeros(len(self.tasks), dtype=np.float32)
        token[self._number] = 1.0
        return {"observation": vector, "task": token}


class MetaWorldExpert:
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

    def reset(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> str:
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
        vector = observation["observation"] if isinstance(observation, dict) else observation
        seen = np.array(vector, dtype=np.float64)  # a copy: some policies write into it
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


class _Simulator:
    """Meta-World's own environment of one task, set up so that a seed alone decides an episode.

    Its ``reset`` ignores seeds, places everything twice from two different draws, and moves the hand to its
    start by simulation, 250 steps each time. Here one draw is placed twice (positions that Meta-World reads
    before they have taken effect are right the second time), and the hand's way is simulated once and kept.
    """

    PLACES = ("body_pos", "site_pos")

    def __init__(self, name: str, view: dict[str, Any]) -> None:
        self.env = env = _environment_class(name)(**view)
        env._set_task_called = True
        env.seeded_rand_vec = True
        env._partially_observable = False  # the goal is part of the observation
        env.__dict__.pop("sawyer_observation_space", None)  # cached from when the goal was hidden
        env.max_path_length = np.inf  # time limits belong to the registration
        self._start: np.ndarray | None = None
        self._move_hand = env._reset_hand
        env._reset_hand = self._reset_hand

    def restart(self, seed: int) -> np.ndarray:
        """Place objects and goal as ``seed`` says; the first observation ``(39,)``."""
        env = self.env
        env.seed(seed)
        env._freeze_rand_vec = False
        self._place()
        env._freeze_rand_vec = True
        observation = self._place()
        env.curr_path_length = 0
        env._prev_obs = observation[:18].copy()
        observation[18:36] = env._prev_obs
        space = env.sawyer_observation_space
        return np.clip(observation, space.low, space.high)  # as Meta-World does after each step

    def clone_state(self) -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
        """MuJoCo's state, the places of bodies and sites, and what Meta-World remembers of the episode."""
        env = self.env
        places = [getattr(env.model, name).copy() for name in self.PLACES]
        remembered = {
            name: value for name, value in vars(env).items() if name not in VIEW and _is_remembered(value)
        }
        return self._physics(), places, copy.deepcopy(remembered)

    def restore_state(self, state: tuple[np.ndarray, list[np.ndarray], dict[str, Any]]) -> None:
        """Go on from a :meth:`clone_state` of the same task."""
        import mujoco

        if self._start is None:
            self.restart(0)  # for what is no part of a state: views of the simulator, the hand's start
        (physics, places, remembered), env = state, self.env
        for name, place in zip(self.PLACES, places, strict=True):
            getattr(env.model, name)[:] = place
        self._set_physics(physics)
        mujoco.mj_forward(env.model, env.data)  # for whoever looks before the next step
        self._set_physics(physics)  # whose warm start the line above has changed
        vars(env).update(copy.deepcopy(remembered))

    def _physics(self) -> np.ndarray:
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(self.env.model, kind))
        mujoco.mj_getState(self.env.model, self.env.data, state, kind)
        return state

    def _set_physics(self, state: np.ndarray) -> None:
        import mujoco

        mujoco.mj_setState(self.env.model, self.env.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)

    def _place(self) -> np.ndarray:
        import mujoco

        mujoco.mj_resetData(self.env.model, self.env.data)
        return np.asarray(self.env.reset_model())

    def _reset_hand(self, **kwargs: Any) -> None:
        import mujoco

        env = self.env
        if self._start is None:
            self._move_hand(**kwargs)
            self._start = self._physics()
        self._set_physics(self._start)
        mujoco.mj_forward(env.model, env.data)
        env.init_tcp = env.tcp_center


def _is_remembered(value: Any) -> bool:
    """Whether an attribute is a number, or an array or list of numbers, and no view of the simulator's own.

    Meta-World takes some of those for copies: what it calls the pads' first places are their current ones.
    """
    base = value
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(value, REMEMBERED) and (base is None or base is value)


def _environment_class(name: str) -> Any:
    from metaworld.env_dict import ENV_CLS_MAP

    return choose(ENV_CLS_MAP, name, "env.env_kwargs.task")


def _beside(hand: np.ndarray, target: np.ndarray, distance: float) -> np.ndarray:
    """The point at the hand's height, beside the first third of the way to the target; left is positive."""
    ahead = target[:2] - hand[:2]
    length = float(np.linalg.norm(ahead))
    ahead = ahead / length if length > 0.01 else np.array([0.0, 1.0])
    third = hand[:2] + (target[:2] - hand[:2]) / 3
    return np.array([*(third + distance * np.array([-ahead[1], ahead[0]])), hand[2]])
