"""Collection of experience: chunks are sampled, executed and recorded, and callbacks get every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from flowpolicy.evaluation.episodes import EpisodeRecord
from flowpolicy.execution.history import Histories
from flowpolicy.finetuning.acting import ChunkActor
from flowpolicy.finetuning.branching import BranchingChunks
from flowpolicy.finetuning.environments import ChunkEnv, ChunkStep, LocalChunks
from flowpolicy.finetuning.stable_baselines3 import ChunkedVecEnv, VecEnvChunks

OnStep = Callable[[Any, Any, Sequence[dict[str, Any]], int], bool]
"""Rewards ``(N,)``, dones ``(N,)`` and N infos of one environment step, and how many environments took it."""


class Buffer(Protocol):
    """Where chunks are recorded."""

    def add(
        self,
        observation: dict[str, torch.Tensor],
        decision: Any,
        step: ChunkStep,
        final_observation: Mapping[str, torch.Tensor] | None,
        /,
    ) -> None:
        """One chunk of every environment.

        Args:
            observation: prepared, what the chunk was sampled from.
            decision: what was sampled.
            step: what the environments answered.
            final_observation: prepared, of the environments whose episode was truncated, in their order;
                None where there is none.
        """


class Collector:
    """Acts in the environments with the policy as it is trained, and fills a buffer.

    Args:
        env: a ``VecEnv``; its environments are stepped without a detour where they are in this process, or
            execute whole chunks.
        networks: what acts.
        generator: source of everything random.
        seconds: where wall time is added up under ``inference`` and ``simulation``.
        group_size: neighbouring environments that start from one state; see :class:`BranchingChunks`.
        branch_length: after how many chunks they do it again.

    Attributes:
        chunks: the environments.
        after: normalised observation after the last chunk, which the next one is sampled from.
    """

    def __init__(
        self,
        env: VecEnv,
        networks: ChunkActor,
        *,
        generator: torch.Generator,
        seconds: dict[str, float],
        group_size: int = 1,
        branch_length: int = 1,
    ) -> None:
        self.networks, self.generator, self.seconds = networks, generator, seconds
        self.after: dict[str, torch.Tensor] = {}
        self.histories: Histories | None = None
        policy = networks.flow_policy
        keys = tuple(policy.spec.observation_shapes)
        self.chunks: ChunkEnv
        if isinstance(env, ChunkedVecEnv):
            self.chunks = env.chunks
        elif type(env) is DummyVecEnv:
            self.chunks = LocalChunks(env.envs, keys, policy.spec.obs_horizon)
        else:
            self.chunks = VecEnvChunks(env, keys, policy.spec.obs_horizon, self._sample_rest)
        if group_size > 1:
            self.chunks = BranchingChunks(self.chunks, group_size, branch_length)

    def start(self, seed: int | None, just_reset: Any) -> None:
        """Begin episodes everywhere, unless some are under way.

        Args:
            seed: of the episodes.
            just_reset: what a plain vectorised environment answered when it was reset last.
        """
        if self.histories is None and isinstance(self.chunks, VecEnvChunks):
            self.histories = self.chunks.start_from(just_reset)
        elif self.histories is None:
            self.histories = self.chunks.reset(seed)

    def collect(
        self,
        buffer: Buffer,
        count: int,
        on_step: OnStep,
        on_episodes: Callable[[list[EpisodeRecord]], None],
    ) -> bool:
        """Execute ``count`` chunks in every environment; False where ``on_step`` stopped it.

        ``on_episodes`` gets the episodes that ended in a chunk before ``on_step`` gets its steps; where
        a ``VecEnv`` takes single steps, ``on_step`` sees each as it is taken.
        """
        assert self.histories is not None
        if isinstance(self.chunks, BranchingChunks):
            self.histories = self.chunks.branch()  # a callback may have stopped within one
        chunks, horizon = self.chunks, self.networks.execute_horizon
        if isinstance(chunks, VecEnvChunks):
            chunks.on_step = lambda rewards, dones, infos: on_step(rewards, dones, infos, chunks.num_envs)
        goes_on, observation = True, self._prepared(self.histories)
        for _ in range(count):
            started = time.perf_counter()
            decision = self.networks.sample(observation, self.generator)
            actions = self.networks.flow_policy.action_normalizer.denormalize(decision.chunk).cpu().numpy()
            sampled_at = time.perf_counter()
            step = chunks.step(actions[:, :horizon])
            self.seconds["inference"] += sampled_at - started
            self.seconds["simulation"] += time.perf_counter() - sampled_at
            final = None
            if step.truncated.any():
                ends = {key: rows[step.truncated] for key, rows in step.final_observation.items()}
                final = self._prepared(ends)
            buffer.add(observation, decision, step, final)
            self.histories = step.observation
            observation = self._prepared(step.observation)
            episodes = chunks.pop_episodes()
            on_episodes(episodes)
            if isinstance(chunks, VecEnvChunks):
                goes_on = not chunks.stopped
            else:
                goes_on = _replay(step, episodes, on_step)
            if not goes_on:
                break
        self.after = observation
        return goes_on

    def _prepared(self, histories: Histories) -> dict[str, torch.Tensor]:
        return self.networks.prepare(self.networks.flow_policy.normalize_observations(histories))

    def _sample_rest(self, histories: Histories, rows: NDArray[Any]) -> NDArray[Any]:
        networks = self.networks
        chunks = networks.sample_chunks(histories, deterministic=False, generator=self.generator)
        return chunks[:, : networks.execute_horizon]


def _replay(step: ChunkStep, episodes: list[EpisodeRecord], on_step: OnStep) -> bool:
    """Pass each environment step of a chunk to ``on_step``, as if it had been executed alone."""
    ended = step.terminated | step.truncated
    whole = dict(zip(np.flatnonzero(ended & ~step.restarted).tolist(), episodes, strict=True))
    for i in range(step.rewards.shape[1]):
        live = step.executed > i
        if not live.any():
            break
        dones = ended & (step.executed == i + 1)
        infos: list[dict[str, Any]] = [{} for _ in ended]
        for row in np.flatnonzero(dones).tolist():
            if row in whole:
                infos[row]["episode"] = {"r": whole[row].ret, "l": whole[row].length}
                if whole[row].success is not None:
                    infos[row]["is_success"] = whole[row].success
        if not on_step(step.rewards[:, i], dones, infos, int(live.sum())):
            return False
    return True
