"""Between chunks and stable-baselines3's vectorised environments, which know single steps: both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.evaluation.environment import check_actions, read_observation
from flowpolicy.evaluation.episodes import EpisodeRecord, EpisodeTally
from flowpolicy.execution.history import Histories, HistoryBuffer
from flowpolicy.finetuning.environments import (
    ChunkEnv,
    ChunkStep,
    check_finite,
    checked_chunks,
    kept_fields,
    require_open,
    require_ready,
)
from flowpolicy.finetuning.parallel_environments import WorkerChunks
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.runs.worker_process import described

OnStep = Callable[[NDArray[np.float32], NDArray[np.bool_], Sequence[dict[str, Any]]], bool]
SampleRest = Callable[[Histories, NDArray[np.int64]], NDArray[Any]]
"""Histories ``(n, T_o, *shape)`` and environment numbers ``(n,)`` -> chunks ``(n, T_e, A)``."""


class VecEnvChunks:
    """Any stable-baselines3 ``VecEnv``; a :class:`flowpolicy.finetuning.environments.ChunkEnv`.

    Its environments can only be stepped together. Where an episode ends inside a chunk, the rest of the
    call is therefore executed in the new episode, with a chunk of ``sample_rest``; those steps are in no
    :class:`ChunkStep` (``observation`` is the history after them), but they count in the episode's return
    and length and in ``unrecorded_steps``.

    Args:
        venv: the vectorised environment. It resets by itself and leaves ``terminal_observation`` and
            ``TimeLimit.truncated`` in its infos, as stable-baselines3 defines.
        keys: observation keys to keep; a Box observation has the one key ``observation``.
        obs_horizon: observations in a history, T_o.
        sample_rest: samples chunks for environments whose episode began inside a call.

    Attributes:
        sample_rest: as above; may be set later.
        on_step: called after every ``venv.step`` with its rewards ``(N,)``, dones ``(N,)`` and N infos; where
            it returns False, the call stops there. Environments that were under way then have
            ``executed`` < T_e and are neither terminated nor truncated.
        stopped: whether ``on_step`` stopped the last call.
        unrecorded_steps: environment steps that are in no ChunkStep, since construction.

    Raises:
        TaskError: the spaces do not fit.
    """

    def __init__(
        self, venv: VecEnv, keys: Sequence[str], obs_horizon: int, sample_rest: SampleRest | None = None
    ) -> None:
        self.venv = venv
        self.num_envs: int = venv.num_envs
        self.observation_space: Any = venv.observation_space
        self.action_space: Any = venv.action_space
        self.sample_rest = sample_rest
        self.on_step: OnStep | None = None
        self.stopped = False
        self.unrecorded_steps = 0
        check_actions(self.action_space)
        self._is_dict = isinstance(self.observation_space, spaces.Dict)
        self._fields = kept_fields(self.observation_space, keys, obs_horizon)
        self._history = HistoryBuffer(self._fields, self.num_envs, obs_horizon)
        self._tally = EpisodeTally(self.num_envs)
        self._ready = self._closed = False

    def reset(self, seed: int | None = None) -> Histories:
        """See :meth:`ChunkEnv.reset`; without a seed, one given to ``venv.seed`` before still counts."""
        require_open(not self._closed)
        if seed is not None:
            self.venv.seed(derived_seed(seed, "environments"))
        return self.start_from(self.venv.reset())

    def start_from(self, observation: Any) -> Histories:
        """Take over a ``venv`` that was just reset, and answered with ``observation``; the histories."""
        self._ready = False
        self._tally.restart()
        self._history.restart()
        self._history.add(self._read(observation))
        self._ready = True
        return self._history.copy()

    def step(self, chunks: NDArray[Any]) -> ChunkStep:
        """See :meth:`ChunkEnv.step`."""
        require_ready(self._ready)
        actions = self._bounded(chunks, self.num_envs)
        self._ready = self.stopped = False
        record = _Recording(*actions.shape[:2])
        final = self._history.copy()
        for at in range(actions.shape[1]):
            done = self._advance(actions[:, at], record, at, final)
            if self.stopped:
                break
            left = actions.shape[1] - at - 1
            if left and done.size:
                actions[done, at + 1 :] = self._sampled(done, actions.shape[1])[:, :left]
        for key, rows in final.items():
            rows[record.live] = self._history.arrays[key][record.live]
        self._ready = True
        observation = final if record.live.all() else self._history.copy()
        return record.result(observation, final)

    def pop_episodes(self) -> list[EpisodeRecord]:
        """See :meth:`ChunkEnv.pop_episodes`."""
        return self._tally.pop()

    def close(self) -> None:
        """See :meth:`ChunkEnv.close`."""
        self._ready = False
        if not self._closed:
            self._closed = True
            self.venv.close()

    def _advance(
        self, actions: NDArray[Any], record: _Recording, at: int, final: Histories
    ) -> NDArray[np.int64]:
        """One step everywhere; the environments whose episode ended. Their true end goes to ``final``."""
        observation, rewards, dones, infos = self._stepped(actions)
        rewards = np.asarray(rewards, dtype=np.float32)
        check_finite(rewards, "a reward")
        rows = self._read(observation)
        self._history.add(rows)
        success = np.array([bool(info.get("success")) for info in infos], dtype=bool)
        for episode, reward, info in zip(self._tally.running, rewards.tolist(), infos, strict=True):
            episode.add(reward, info)
        record.add(at, rewards, success)
        self.unrecorded_steps += int(self.num_envs - record.live.sum())
        ended = np.flatnonzero(dones)
        for row in ended.tolist():
            self._tally.end(row)
            true_end = self._true_end(row, infos[row])
            if record.live[row]:
                for key, history in self._history.arrays.items():
                    final[key][row] = history[row]
                    final[key][row, -1] = true_end[key]
                record.end(row, bool(infos[row].get("TimeLimit.truncated", False)))
        self._history.restart(ended)
        self._history.add({key: values[ended] for key, values in rows.items()}, ended)
        if self.on_step is not None:
            self.stopped = not self.on_step(rewards, np.asarray(dones, dtype=bool), infos)
        return ended

    def _stepped(self, actions: NDArray[Any]) -> Any:
        try:
            return self.venv.step(actions)
        except (EOFError, ConnectionError) as error:
            raise FlowPolicyError(
                "A process of the vectorised environment died; its own message stands above, and the run "
                "can go on from its last checkpoint with a new environment."
            ) from error
        except FlowPolicyError:
            raise
        except Exception as error:
            raise FlowPolicyError(
                f"The vectorised environment raised {described(error)}; fix the environment, "
                "then call reset() or start again."
            ) from error

    def _sampled(self, rows: NDArray[np.int64], steps: int) -> NDArray[Any]:
        if self.sample_rest is None:
            raise FlowPolicyError(
                "An episode ended inside a chunk, and the rest of the call has no actions; set sample_rest."
            )
        rest = np.asarray(self.sample_rest(self._history.copy(rows), rows))
        if rest.shape[1:2] != (steps,):
            raise FlowPolicyError(
                f"sample_rest gave the shape {rest.shape}; it must give chunks of {steps} actions."
            )
        return self._bounded(rest, len(rows))

    def _bounded(self, chunks: NDArray[Any], rows: int) -> NDArray[Any]:
        space = self.action_space
        bounded = np.clip(checked_chunks(chunks, rows, space), space.low, space.high)
        return np.asarray(bounded, dtype=space.dtype)

    def _named(self, observation: Any) -> Any:
        return observation if self._is_dict else {"observation": observation}

    def _read(self, observation: Any) -> Histories:
        rows = read_observation(self._named(observation), self._fields, (self.num_envs,))
        for key, values in rows.items():
            check_finite(values, f"an observation '{key}'")
        return rows

    def _true_end(self, row: int, info: dict[str, Any]) -> Histories:
        if "terminal_observation" not in info:
            raise FlowPolicyError(
                "The vectorised environment ended an episode and left no info['terminal_observation']; "
                "use one that keeps the conventions of stable-baselines3."
            )
        values = read_observation(self._named(info["terminal_observation"]), self._fields)
        for key, value in values.items():
            check_finite(value[None], f"an observation '{key}'", row)
        return values


class _Recording:
    """The arrays of a ChunkStep while its steps are taken; ``live`` rows have not ended yet."""

    def __init__(self, num_envs: int, steps: int) -> None:
        self.live = np.ones(num_envs, dtype=bool)
        self.rewards = np.zeros((num_envs, steps), dtype=np.float32)
        self.executed = np.zeros(num_envs, dtype=np.int64)
        self.terminated, self.truncated, self.success = np.zeros((3, num_envs), dtype=bool)

    def add(self, at: int, rewards: NDArray[np.float32], success: NDArray[np.bool_]) -> None:
        self.rewards[self.live, at] = rewards[self.live]
        self.executed[self.live] = at + 1
        self.success |= success & self.live

    def end(self, row: int, truncated: bool) -> None:
        self.live[row] = False
        self.truncated[row] = truncated
        self.terminated[row] = not truncated

    def result(self, observation: Histories, final: Histories) -> ChunkStep:
        return ChunkStep(
            observation=observation,
            final_observation=final,
            rewards=self.rewards,
            executed=self.executed,
            terminated=self.terminated,
            truncated=self.truncated,
            success=self.success,
            restarted=np.zeros(len(self.live), dtype=bool),
        )


class ChunkedVecEnv(VecEnv):
    """A ``VecEnv`` over a :class:`flowpolicy.finetuning.environments.ChunkEnv`.

    ReinFlow takes ``chunks`` out and sends whole chunks. For everyone else, such as ``evaluate_policy``, each
    ``step`` is a chunk of one action, with the infos that stable-baselines3 defines.

    Args:
        chunks: the environments; histories may be longer than one observation. An environment whose
            only key is ``observation`` is shown with that Box.
    """

    def __init__(self, chunks: ChunkEnv) -> None:
        self.chunks = chunks
        space = chunks.observation_space
        self._is_plain = isinstance(space, spaces.Dict) and list(space.spaces) == ["observation"]
        self._seed: int | None = None
        self._actions: NDArray[Any] = np.zeros(0)
        super().__init__(
            chunks.num_envs, space["observation"] if self._is_plain else space, chunks.action_space
        )

    @classmethod
    def in_processes(
        cls,
        make_envs: Sequence[Callable[[], Any]],
        num_workers: int,
        keys: Sequence[str] = ("observation",),
        obs_horizon: int = 1,
    ) -> ChunkedVecEnv:
        """Environments spread over ``num_workers`` processes, a dead one of which is replaced."""
        return cls(WorkerChunks(make_envs, num_workers, keys, obs_horizon))

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed all environments at the next reset; see :meth:`ChunkEnv.reset`."""
        self._seed = seed
        return [seed] * self.num_envs

    def reset(self) -> Any:
        """First observations of new episodes."""
        seed, self._seed = self._seed, None
        return self._newest(self.chunks.reset(seed))

    def step_async(self, actions: NDArray[Any]) -> None:
        """Remember the actions ``(N, A)``."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> Any:
        """Execute them; observations, rewards, dones and infos."""
        step = self.chunks.step(self._actions[:, None])
        dones = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{} for _ in dones]
        finals = self._newest(step.final_observation)
        for row in np.flatnonzero(dones).tolist():
            final = finals[row] if self._is_plain else {key: value[row] for key, value in finals.items()}
            infos[row] = {"terminal_observation": final, "TimeLimit.truncated": bool(step.truncated[row])}
        for row in np.flatnonzero(step.success).tolist():
            infos[row]["success"] = True
        whole = np.flatnonzero(dones & ~step.restarted).tolist()
        for row, episode in zip(whole, self.chunks.pop_episodes(), strict=True):
            infos[row]["episode"] = {"r": episode.ret, "l": episode.length, "t": 0.0}
        return self._newest(step.observation), step.rewards[:, 0], dones, infos

    def close(self) -> None:
        """Close the environments."""
        self.chunks.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """``render_mode``, which is None; nothing else of an environment elsewhere can be reached."""
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(f"'{attr_name}' of environments in other processes cannot be reached.")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused."""
        raise FlowPolicyError(
            f"'{attr_name}' cannot be set in environments that execute chunks; set it where they are made."
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> Any:
        """Refused."""
        raise FlowPolicyError(
            f"'{method_name}' cannot be called in environments that execute chunks; call it where they are "
            "made."
        )

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether an episode's true return is in the infos, which is what a Monitor is asked for."""
        from stable_baselines3.common.monitor import Monitor

        return [wrapper_class is Monitor] * self.num_envs

    def _newest(self, histories: dict[str, NDArray[Any]]) -> Any:
        newest = {key: history[:, -1] for key, history in histories.items()}
        return newest["observation"] if self._is_plain else newest


def refuse_other_environments(env: Any) -> None:
    """Raise a ConfigError for what is no environment, no id of one, and no stable-baselines3 ``VecEnv``."""
    if env is None or isinstance(env, str | gymnasium.Env | VecEnv):
        return
    kind = type(env).__name__
    if isinstance(env, type):
        kind = f"the class {env.__name__}"
    elif isinstance(env, gymnasium.vector.VectorEnv):
        kind = f"Gymnasium's vector environment {kind}"
    raise ConfigError(
        f"env is {kind}; it must be a Gymnasium environment, its id, or several as "
        "stable_baselines3.common.env_util.make_vec_env(id, n_envs=16) makes them."
    )
