"""Whole action chunks in MuJoCo without Gymnasium's step: simulated on threads, judged for all at once.

``env.native: module:Class`` in a task's file names the :class:`NativeTask` of it. Resets, random numbers and
models are the environments' own; only their ``step`` is replaced.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium import wrappers
from numpy.typing import NDArray

from flowpolicy.errors import ConfigError, TaskError
from flowpolicy.execution.history import Histories
from flowpolicy.finetuning.cloning import COUNTING, PASSIVE
from flowpolicy.finetuning.environments import LocalChunks, Played, env_error, require_ready
from flowpolicy.finetuning.staggered import CutFirstEpisode
from flowpolicy.optional import optional
from flowpolicy.runs.worker_process import described
from flowpolicy.settings import require

Quantities = Mapping[str, NDArray[np.float64]]
"""Array of ``mujoco.MjData`` -> ``(N, T_e + 1, *shape)``: before a chunk, and after each of its steps."""

KEY = "observation"
NEVER = np.iinfo(np.int64).max // 2
_WRAPPERS = (*PASSIVE, *COUNTING)
"""What may be around an environment: it changes nothing, or is done here too."""


@dataclass(frozen=True)
class Outcomes:
    """What an environment says of the steps of N chunks.

    Attributes:
        observation: ``(N, T_e, *shape)``.
        rewards: ``(N, T_e)``.
        terminated: ``(N, T_e)``.
        success: ``(N, T_e)``, ``info["success"]``; None where there is no such entry.
    """

    observation: NDArray[Any]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    success: NDArray[np.bool_] | None = None


class NativeTask(ABC):
    """How observation, reward and end of a Gymnasium environment follow from MuJoCo's arrays.

    Args:
        envs: environments without their wrappers, N.

    Attributes:
        environment: the class of the environments.
        wrappers: that may be around them, besides Gymnasium's own and the package's.
        quantities: arrays of ``mujoco.MjData`` that the outcomes need, as they are after each ``step``.
        post_constraint: whether one of them is a result of ``mj_rnePostConstraint``, as contact forces are.
        places: what a reset draws besides the state: arrays of the model, and the environment's names for the
            rows that it sets.
    """

    environment: ClassVar[type]
    wrappers: ClassVar[tuple[type, ...]] = ()
    quantities: ClassVar[tuple[str, ...]] = ("qpos", "qvel")
    post_constraint: ClassVar[bool] = False
    places: ClassVar[Sequence[tuple[str, str]]] = ()

    def __init__(self, envs: Sequence[Any]) -> None:
        self.envs = envs

    def controls(self, actions: NDArray[Any]) -> NDArray[Any]:
        """``MjData.ctrl`` of actions ``(..., A)`` within the action space."""
        return actions

    @abstractmethod
    def outcomes(self, actions: NDArray[Any], quantities: Quantities) -> Outcomes:
        """What ``step`` answers to the actions ``(N, T_e, A)``."""

    def drawn(self, env: Any) -> NDArray[np.float64]:
        """What the last reset of ``env`` drew besides the state, ``(n,)``."""
        rows = [getattr(env.model, name)[getattr(env, row)] for name, row in self.places]
        return np.concatenate([np.zeros(0), *rows])

    def put(self, env: Any, drawn: NDArray[np.float64]) -> None:
        """Set what :meth:`drawn` gave, in another environment."""
        for name, row in self.places:
            place = getattr(env.model, name)[getattr(env, row)]
            place[:], drawn = drawn[: len(place)], drawn[len(place) :]


@dataclass(frozen=True)
class SimulatorStates:
    """Moments of episodes that can be gone on from, in the same environments or in others of the task.

    Attributes:
        physics: ``(M, n)``, MuJoCo's ``mjSTATE_INTEGRATION``, the solver's warm start included.
        drawn: ``(M, m)``, see :meth:`NativeTask.drawn`.
        quantities: name -> ``(M, *shape)``, see :attr:`NativeTask.quantities`.
        left: ``(M,)``, steps until the episode's time limit.
        histories: key -> ``(M, T_o, *shape)``.
    """

    physics: NDArray[np.float64]
    drawn: NDArray[np.float64]
    quantities: dict[str, NDArray[np.float64]]
    left: NDArray[np.int64]
    histories: Histories

    def __len__(self) -> int:
        return len(self.left)

    def rows(self, index: Any) -> SimulatorStates:
        """Some of them; ``np.repeat(rows, G)`` gives each of ``rows`` G times, for groups of chunks."""
        return SimulatorStates(
            self.physics[index],
            self.drawn[index],
            {name: rows[index] for name, rows in self.quantities.items()},
            self.left[index],
            {key: rows[index] for key, rows in self.histories.items()},
        )


class NativeChunks(LocalChunks):
    """MuJoCo environments whose chunks are simulated on threads; a ``ChunkEnv``.

    It answers what :class:`~flowpolicy.finetuning.environments.LocalChunks` does, number for number. Each
    environment's ``MjData`` is stepped action by action with ``mj_step``, during which other threads run:
    ``mujoco.rollout`` hands out neither the solver's warm start, without which the next chunk is another one,
    nor positions of sites and contact forces, and stops at any warning. What is left of a chunk at an
    episode's end is simulated as well, and dropped.

    Args:
        envs: Gymnasium environments of one task.
        keys: ``("observation",)``.
        obs_horizon: observations in a history, T_o.
        task: what follows from their states.
        threads: that simulate, the caller's among them, at most one per environment.

    Raises:
        TaskError: the environments are not those of the task, or a step of theirs has another outcome.
    """

    def __init__(
        self,
        envs: Sequence[Any],
        keys: Sequence[str],
        obs_horizon: int,
        task: type[NativeTask],
        *,
        threads: int = 1,
    ) -> None:
        require(threads >= 1, "threads", threads, "at least 1")
        with optional("Native chunks need {name}", "mujoco", TaskError):
            import mujoco
        self._mujoco = mujoco
        super().__init__(envs, keys, obs_horizon)
        if tuple(keys) != (KEY,):
            raise TaskError(f"Native chunks give the observation '{KEY}' alone, and not {', '.join(keys)}.")
        self._limits, self._cuts = np.array([_limits(env, task) for env in self.envs], dtype=np.int64).T
        self._left = np.minimum(self._limits, self._cuts)
        self._raw = [env.unwrapped for env in self.envs]
        _check_outcomes(task, self._raw[0], self.action_space)
        self._task = task(self._raw)
        self._arrays = [{name: getattr(raw.data, name) for name in task.quantities} for raw in self._raw]
        self._now = {name: np.stack([a[name] for a in self._arrays]) for name in task.quantities}
        self._helpers = min(threads, self.num_envs) - 1  # the caller's thread simulates too
        self._pool = ThreadPoolExecutor(max(self._helpers, 1), "simulation")  # starts none before it is used

    def why_not_restorable(self) -> str:
        """Empty: what MuJoCo's state is, is known."""
        return ""

    def states(self) -> SimulatorStates:
        """Where all environments stand now, N rows."""
        require_ready(self._ready)
        return SimulatorStates(
            np.stack([self._physics(raw) for raw in self._raw]),
            np.stack([self._task.drawn(raw) for raw in self._raw]),
            {name: rows.copy() for name, rows in self._now.items()},
            self._left.copy(),
            self._history.copy(),
        )

    def _restore(self, states: SimulatorStates, rows: Sequence[int]) -> None:
        for row, physics, drawn in zip(rows, states.physics, states.drawn, strict=True):
            raw = self._raw[row]
            self._task.put(raw, drawn)
            self._mujoco.mj_setState(raw.model, raw.data, physics, self._mujoco.mjtState.mjSTATE_INTEGRATION)
        for name, quantity in states.quantities.items():
            self._now[name][rows] = quantity
        self._left[rows], self._cuts[rows] = states.left, NEVER

    def close(self) -> None:
        """See :meth:`ChunkEnv.close`."""
        self._pool.shutdown()
        super().close()

    def _execute(self, actions: NDArray[Any], tape: Histories, rewards: NDArray[np.float64]) -> Played:
        steps, every = actions.shape[1], np.arange(self.num_envs)
        quantities = self._simulate(self._task.controls(actions))
        found = self._task.outcomes(actions, quantities)
        taken = np.arange(1, steps + 1)
        over = taken >= self._left[:, None]
        ended = found.terminated | over
        has_ended = ended.any(axis=1)
        executed = np.where(has_ended, ended.argmax(axis=1) + 1, steps)
        live = taken <= executed[:, None]
        rewards[live] = found.rewards[live]
        tape[KEY][:, -steps:][live] = found.observation[live]
        self._left -= executed
        self._cuts[has_ended] = NEVER
        self._now = {name: rows[every, executed] for name, rows in quantities.items()}
        success = np.zeros(self.num_envs, dtype=bool)
        if found.success is not None:
            success = (found.success & live).any(axis=1)
            for episode, succeeded in zip(self._tally.running, success.tolist(), strict=True):
                episode.success = bool(episode.success or succeeded)
        last = executed - 1
        return executed, found.terminated[every, last], over[every, last], success

    def _simulate(self, controls: NDArray[Any]) -> Quantities:
        """Simulate ``controls``, ``(N, T_e, nu)``; each environment's ``MjData`` is left at the end."""
        count, steps = controls.shape[:2]
        quantities = {}
        for name, now in self._now.items():
            quantities[name] = np.empty((count, steps + 1, *now.shape[1:]))
            quantities[name][:, 0] = now
        rows = iter(range(count))  # shared: each thread takes the next environment
        helpers = [
            self._pool.submit(self._simulate_rows, rows, controls, quantities) for _ in range(self._helpers)
        ]
        try:
            self._simulate_rows(rows, controls, quantities)
        finally:
            started = [helper for helper in helpers if not helper.cancel()]  # a busy machine may start none
            wait(started)  # also after an error or Ctrl-C: a reset may follow
        for helper in started:
            helper.result()
        return quantities

    def _simulate_rows(self, rows: Iterator[int], controls: NDArray[Any], quantities: Quantities) -> None:
        step, post_constraint = self._mujoco.mj_step, self._mujoco.mj_rnePostConstraint
        for row in rows:
            raw, arrays = self._raw[row], self._arrays[row]
            model, data, control, skip = raw.model, raw.data, raw.data.ctrl, raw.frame_skip
            kept = [(quantities[name][row], array) for name, array in arrays.items()]
            try:
                for at, wanted in enumerate(controls[row], start=1):
                    control[:] = wanted
                    step(model, data, nstep=skip)
                    if self._task.post_constraint:
                        post_constraint(model, data)
                    for tape, array in kept:
                        tape[at] = array
            except Exception as error:
                raise env_error(row, "raised", error) from error

    def _start_episode(self, row: int, seed: int | None) -> None:
        super()._start_episode(row, seed)
        self._left[row] = min(self._limits[row], self._cuts[row])
        for name, array in self._arrays[row].items():
            self._now[name][row] = array

    def _physics(self, raw: Any) -> NDArray[np.float64]:
        spec = self._mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(self._mujoco.mj_stateSize(raw.model, spec))
        self._mujoco.mj_getState(raw.model, raw.data, state, spec)
        return state


def native_task(name: str) -> type[NativeTask]:
    """The class that ``env.native`` names, as ``module:Class``.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = str(name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(
            f"env.native={name} cannot be found ({described(error)}); write it module:Class, or null."
        ) from error
    if not (isinstance(found, type) and issubclass(found, NativeTask)):
        raise ConfigError(f"env.native={name} is no NativeTask; write one, or null.")
    return found


def _limits(env: Any, task: type[NativeTask]) -> tuple[int, int]:
    """Steps of an episode, and of the first one where that is cut short."""
    if type(env.unwrapped) is not task.environment:
        raise TaskError(
            f"{task.__name__} is the native form of {task.environment.__name__}, and the environment is a "
            f"{type(env.unwrapped).__name__}."
        )
    limit, cut = NEVER, NEVER
    while env is not env.unwrapped:
        if type(env) not in (*_WRAPPERS, *task.wrappers):
            raise TaskError(
                f"{task.__name__} is the native form of {task.environment.__name__} alone, and the "
                f"environment has a {type(env).__name__} around it."
            )
        if isinstance(env, wrappers.TimeLimit):
            limit = min(limit, env._max_episode_steps)
        elif isinstance(env, CutFirstEpisode) and env.left is not None:
            cut = env.left
        env = env.env
    return limit, cut


def _check_outcomes(task: type[NativeTask], raw: Any, action_space: Any) -> None:
    """Refuse (TaskError) a task whose outcomes are not those of the environment that is installed."""
    low, high = action_space.low, action_space.high
    actions = (
        np.random.default_rng(0).uniform(low, high, (1, 3, *action_space.shape)).astype(action_space.dtype)
    )
    raw.reset()
    native, answers = task([raw]), []
    seen = {name: [np.array(getattr(raw.data, name))] for name in task.quantities}
    for action in actions[0]:
        answers.append(raw.step(action)[:3])
        for name, arrays in seen.items():
            arrays.append(np.array(getattr(raw.data, name)))
    found = native.outcomes(actions, {name: np.stack(arrays)[None] for name, arrays in seen.items()})
    pairs = zip(("observation", "reward", "end"), zip(*answers, strict=True), strict=True)
    ours = (found.observation[0], found.rewards[0], found.terminated[0])
    for (what, theirs), our in zip(pairs, ours, strict=True):
        if not np.allclose(np.stack(theirs), our, rtol=1e-9, atol=1e-9):
            raise TaskError(
                f"{task.__name__} computes another {what} than {task.environment.__name__} of the version "
                "that is installed."
            )
    if not np.array_equal(raw.data.ctrl, native.controls(actions)[0, -1]):
        raise TaskError(f"{task.__name__} sends other controls than {task.environment.__name__} does.")
