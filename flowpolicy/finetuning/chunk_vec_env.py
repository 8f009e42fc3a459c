"""Whole action chunks in a vectorised environment of stable-baselines3, which knows single steps only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError
from flowpolicy.finetuning.chunk_env import (
    ChunkStep,
    EpisodeRecord,
    EpisodeTally,
    described,
    require_open,
    require_ready,
)
from flowpolicy.finetuning.chunk_spaces import ChunkSpaces, Histories, check_finite, copied
from flowpolicy.runs.seeds import derived_seed

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

OnStep = Callable[[NDArray[np.float32], NDArray[np.bool_], Sequence[dict[str, Any]]], bool]
PlanRest = Callable[[Histories, NDArray[np.int64]], NDArray[Any]]
"""Histories ``(n, T_o, *shape)`` and environment numbers ``(n,)`` -> chunks ``(n, T_e, A)``."""


class VecEnvChunks:
    """Any stable-baselines3 ``VecEnv``; a :class:`flowpolicy.finetuning.chunk_env.ChunkEnv`.

    Its environments can only be stepped together. Where an episode ends inside a chunk, the rest of the
    call is therefore played in the new episode, by a chunk of ``plan_rest``; those steps are in no
    :class:`ChunkStep` (``observation`` is the history after them), but they count in the episode's return
    and length and in ``unrecorded_steps``.

    Args:
        venv: the vectorised environment. It resets by itself and leaves ``terminal_observation`` and
            ``TimeLimit.truncated`` in its infos, as stable-baselines3 defines.
        keys: observation keys to keep; a Box observation has the one key ``observation``.
        obs_horizon: observations in a history, T_o.
        plan_rest: plans for environments whose episode began inside a call.

    Attributes:
        plan_rest: as above; may be set later.
        on_step: called after every ``venv.step`` with its rewards ``(N,)``, dones ``(N,)`` and N infos; where
            it returns False, the call stops there. Environments that were under way then have
            ``executed`` < T_e and are neither terminated nor truncated.
        stopped: whether ``on_step`` stopped the last call.
        unrecorded_steps: environment steps that are in no ChunkStep, since construction.

    Raises:
        TaskError: the spaces do not fit.
    """

    def __init__(
        self, venv: VecEnv, keys: Sequence[str], obs_horizon: int, plan_rest: PlanRest | None = None
    ) -> None:
        self.venv = venv
        self.num_envs: int = venv.num_envs
        self.observation_space: Any = venv.observation_space
        self.action_space: Any = venv.action_space
        self.plan_rest = plan_rest
        self.on_step: OnStep | None = None
        self.stopped = False
        self.unrecorded_steps = 0
        self._spaces = ChunkSpaces(self.observation_space, self.action_space, keys, obs_horizon)
        self._tally = EpisodeTally(self.num_envs)
        self._history: Histories = {}
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
        rows = self._read(observation)
        self._history = self._spaces.tape(self.num_envs, 0)
        for key, history in self._history.items():
            history[:] = rows[key][:, None]
        self._ready = True
        return copied(self._history)

    def step(self, chunks: NDArray[Any]) -> ChunkStep:
        """See :meth:`ChunkEnv.step`."""
        require_ready(self._ready)
        actions = self._spaces.bounded(chunks, self.num_envs)
        self._ready = self.stopped = False
        record = _Recording(*actions.shape[:2])
        final = copied(self._history)
        for at in range(actions.shape[1]):
            done = self._advance(actions[:, at], record, at, final)
            if self.stopped:
                break
            left = actions.shape[1] - at - 1
            if left and done.size:
                actions[done, at + 1 :] = self._planned(done, actions.shape[1])[:, :left]
        for key, rows in final.items():
            rows[record.live] = self._history[key][record.live]
        self._ready = True
        observation = final if record.live.all() else copied(self._history)
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
        for key, history in self._history.items():
            history[:, :-1] = history[:, 1:].copy()
            history[:, -1] = rows[key]
        success = [bool(info["success"]) if "success" in info else None for info in infos]
        self._tally.add(rewards.tolist(), [1] * self.num_envs, success)
        record.add(at, rewards, np.array(success, dtype=bool))
        self.unrecorded_steps += int(self.num_envs - record.live.sum())
        ended = np.flatnonzero(dones)
        for row in ended.tolist():
            self._tally.end(row)
            true_end = self._true_end(row, infos[row])
            for key, history in self._history.items():
                if record.live[row]:
                    final[key][row, :-1] = history[row, :-1]
                    final[key][row, -1] = true_end[key]
                history[row] = rows[key][row]
            if record.live[row]:
                record.end(row, bool(infos[row].get("TimeLimit.truncated", False)))
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
                f"The vectorised environment raised {described(error)}; mend the environment, "
                "then call reset() or start again."
            ) from error

    def _planned(self, rows: NDArray[np.int64], steps: int) -> NDArray[Any]:
        if self.plan_rest is None:
            raise FlowPolicyError(
                "An episode ended inside a chunk and nothing plans the rest of the call; set plan_rest."
            )
        rest = np.asarray(
            self.plan_rest({key: history[rows] for key, history in self._history.items()}, rows)
        )
        if rest.shape[1:2] != (steps,):
            raise FlowPolicyError(
                f"plan_rest gave the shape {rest.shape}; it must give chunks of {steps} actions."
            )
        return self._spaces.bounded(rest, len(rows))

    def _read(self, observation: Any) -> Histories:
        rows = self._spaces.read(observation, (self.num_envs,))
        for key, values in rows.items():
            check_finite(values, f"an observation '{key}'")
        return rows

    def _true_end(self, row: int, info: dict[str, Any]) -> Histories:
        if "terminal_observation" not in info:
            raise FlowPolicyError(
                "The vectorised environment ended an episode and left no info['terminal_observation']; "
                "use one that keeps the conventions of stable-baselines3."
            )
        values = self._spaces.read(info["terminal_observation"])
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
