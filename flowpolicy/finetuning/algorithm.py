"""Stable-baselines3 algorithms that act by whole chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import get_system_info
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.episodes import EpisodeRecord
from flowpolicy.evaluation.rollout import check_spaces
from flowpolicy.finetuning.acting import ChunkActor
from flowpolicy.finetuning.actor_critic import FlowActorCritic
from flowpolicy.finetuning.advantages import ReturnScale
from flowpolicy.finetuning.buffer import ChunkBuffer
from flowpolicy.finetuning.collector import Buffer, Collector
from flowpolicy.finetuning.environments import ChunkEnv
from flowpolicy.finetuning.learner import Learner
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.progress import BOUNDS, Progress
from flowpolicy.finetuning.stable_baselines3 import refuse_other_environments
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import require


class ChunkLearning(BaseAlgorithm):
    """Environments, callbacks and episodes as users of stable-baselines3 know them, and a collector below.

    It stands before an algorithm of stable-baselines3 among the bases of a class, which sets the attributes
    that are declared here.

    Attributes:
        collector: acts in the environments, where there are any.
        seconds: wall time spent in ``simulation``, ``inference`` and ``update`` since construction.
        group_size: neighbouring environments that start from one state; 1 where each goes its way.
        branch_length: after how many chunks they do it again.
    """

    group_size = branch_length = 1
    actor_critic: ChunkActor
    generator: torch.Generator
    processes: Processes
    seconds: dict[str, float]
    restarts_before: int
    collector: Collector

    @property
    @abstractmethod
    def iteration(self) -> int:
        """Iterations done."""

    def origin(self, policy: FlowPolicy, algorithm: str, num_steps: int | None) -> dict[str, Any]:
        """The metadata of a policy that this made, with an algorithm of that name, for K = ``num_steps``."""
        return {
            **policy.spec.metadata,
            "finetuned_with": algorithm,
            "finetuned_steps": self.num_timesteps,
            "finetuned_num_steps": num_steps,
        }

    @abstractmethod
    def visited_observations(self) -> dict[str, torch.Tensor]:
        """Prepared observations from the model's own rollouts, key -> ``(n, T_o, *shape)``."""

    @property
    def gathers(self) -> bool:
        """Chunks wait to be learned from, which a saved model does not have with it."""
        return False

    @property
    @abstractmethod
    def scale(self) -> ReturnScale:
        """By which rewards are divided."""

    @property
    def chunks(self) -> ChunkEnv:
        """The environments that execute whole chunks."""
        return self.collector.chunks

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As stable-baselines3 does, but images keep their channels last."""
        wrapped = BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        while isinstance(wrapped, VecTransposeImage):
            wrapped = wrapped.venv
        return wrapped

    def _adopt(self, env: VecEnv) -> None:
        """Execute chunks in ``env`` from now on; all environments are reset."""
        if self._vec_normalize_env is not None:
            raise ConfigError(
                "The environment is in a VecNormalize, and the policy normalises by itself; leave it out."
            )
        check_spaces(env, self.actor_critic.flow_policy, "The environment")
        self.scale.running = np.zeros(env.num_envs // self.group_size)
        self.collector = Collector(
            env,
            self.actor_critic,
            generator=self.generator,
            seconds=self.seconds,
            group_size=self.group_size,
            branch_length=self.branch_length,
        )

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Go on in another environment of the same spaces; a loaded model has none until then."""
        refuse_other_environments(env)
        if self.env is None:
            env = self._wrap_env(env, self.verbose)
            check_spaces(env, self.actor_critic.flow_policy, "The environment")
            self.n_envs, self.observation_space, self.action_space = (
                env.num_envs, env.observation_space, env.action_space,
            )  # fmt: skip
            self.actor_critic.action_space = self.action_space
        super().set_env(env, force_reset)
        assert self.env is not None
        self._adopt(self.env)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        if self.env is None:
            raise ConfigError(
                "The model has no environment to learn in; give load() an env, or call set_env()."
            )
        before = self._last_obs
        result = super()._setup_learn(*args, **kwargs)
        if self._last_obs is not before:  # the environments were reset
            self.collector.histories = None
            self.scale.running = np.zeros(self.n_envs // self.group_size)
        return result

    def _collect(self, callback: BaseCallback, buffer: Buffer, count: int) -> bool:
        """Execute ``count`` chunks in every environment; False where a callback stops training."""
        place = ("episodes", self.processes.rank, self.iteration)
        self.collector.start(None if self.seed is None else derived_seed(self.seed, *place), self._last_obs)
        callback.on_rollout_start()
        before = self.num_timesteps

        def on_step(rewards: Any, dones: Any, infos: Any, count: int) -> bool:
            self.num_timesteps += count
            callback.update_locals({"dones": dones, "rewards": rewards, "infos": infos, "self": self})
            return callback.on_step()

        goes_on = self.collector.collect(buffer, count, on_step, self._record_episodes)
        everywhere = self.processes.gather(self.num_timesteps - before, float(goes_on))
        self.num_timesteps = before + int(sum(steps for steps, _ in everywhere))
        goes_on = all(flag for _, flag in everywhere)
        if goes_on:
            callback.on_rollout_end()
        return goes_on

    def deployed_policy(self) -> FlowPolicy:
        """The policy to deploy, marked with the K it is tuned for."""
        return self.actor_critic.deployed()

    def _record_episodes(self, episodes: list[EpisodeRecord]) -> None:
        assert self.ep_info_buffer is not None
        assert self.ep_success_buffer is not None
        for episode in episodes:
            self.ep_info_buffer.append({"r": episode.ret, "l": episode.length})
            if episode.success is not None:
                self.ep_success_buffer.append(episode.success)

    def progress_numbers(self) -> dict[str, Any]:
        """Of :class:`Progress`, what every algorithm counts itself."""
        return {
            "num_timesteps": self.num_timesteps, "total_timesteps": self._total_timesteps,
            "remaining": self._current_progress_remaining, "seconds": self.seconds,
            "worker_restarts": self.worker_restarts,
        }  # fmt: skip

    def bounds(self) -> dict[str, torch.Tensor]:
        """Of the action space, by the names that a saved model has for them."""
        assert isinstance(self.action_space, spaces.Box)
        pair = zip(BOUNDS, (self.action_space.low, self.action_space.high), strict=True)
        return {name: torch.as_tensor(bound) for name, bound in pair}

    def go_on_from(self, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over how far a saved model had come; its bounds of the action space without an environment."""
        self.num_timesteps, self._total_timesteps = progress.num_timesteps, progress.total_timesteps
        self._current_progress_remaining, self._n_updates = progress.remaining, progress.updates
        self.restarts_before = progress.worker_restarts
        self.seconds.update({name: progress.seconds.get(name, 0.0) for name in self.seconds})
        if self.env is None:
            low, high = (tensors[name].numpy() for name in BOUNDS)
            self.action_space = self.actor_critic.action_space = spaces.Box(low, high, dtype=np.float32)

    def save(  # type: ignore[override]
        self, path: str | Path | IO[bytes], exclude: Any = None, include: Any = None
    ) -> None:
        """Write a zip file of ``config.json`` and ``model.safetensors``; no pickle, so nothing to exclude.

        Args:
            path: of the file, to which ``.zip`` is added where it has no suffix, or a binary stream.
            exclude: of stable-baselines3's interface; must be None.
            include: likewise.
        """
        require(exclude is None and include is None, "exclude", exclude, "None: the file holds no objects")
        self._write(path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | Path | IO[bytes],
        env: Any = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **settings: Any,
    ) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: of the file, with or without ``.zip``, or a binary stream.
            env: as in the constructor; None can predict, and learns after ``set_env``.
            device: of the networks.
            custom_objects: further ``settings``.
            print_system_info: print versions of the libraries.
            force_reset: of stable-baselines3's interface; episodes always start with a reset.
            settings: keyword arguments of the constructor that replace the saved ones. Schedules that are
                functions, regularizers and demonstrations are not in the file and must be given again.

        Raises:
            CheckpointError: no such file, a damaged one, or one of something else.
        """
        if print_system_info:
            get_system_info()
        return cls._read(path, env, device, {**(custom_objects or {}), **settings})

    @abstractmethod
    def _write(self, path: str | Path | IO[bytes]) -> None:
        """See :meth:`save`."""

    @classmethod
    @abstractmethod
    def _read(
        cls, path: str | Path | IO[bytes], env: Any, device: torch.device | str, replaced: dict[str, Any]
    ) -> Self:
        """See :meth:`load`."""

    @property
    def worker_restarts(self) -> int:
        """Simulating processes that died and were replaced, over all resumed parts of a run."""
        return self.restarts_before + (0 if self.env is None else getattr(self.chunks, "restarts", 0))


class ChunkAlgorithm(ChunkLearning, OnPolicyAlgorithm):
    """One that learns from each iteration's chunks and forgets them; a subclass defines ``train``."""

    actor_critic: FlowActorCritic
    learner: Learner
    noise: NoiseConfig

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.learner.iteration

    @property
    def scale(self) -> ReturnScale:
        """By which rewards are divided."""
        return self.learner.scale

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: ChunkBuffer, n_rollout_steps: int
    ) -> bool:
        """Sample a chain per chunk, execute the chunk, record both; False where a callback stops training."""
        if not self.learner.update.offline:
            rollout_buffer.reset()
        self._update_current_progress_remaining(self.num_timesteps, max(1, self._total_timesteps))
        self.actor_critic.flow.noise.set_bounds(*self.noise.bounds(1.0 - self._current_progress_remaining))
        return self._collect(callback, rollout_buffer, n_rollout_steps)

    def visited_observations(self) -> dict[str, torch.Tensor]:
        """Normalised observations of the last iteration, key -> ``(S x N, T_o, *shape)``.

        A model that was just loaded runs one iteration for them, whose steps count.
        """
        buffer: ChunkBuffer = self.rollout_buffer  # type: ignore[assignment]
        if not len(buffer):
            _, callback = self._setup_learn(0, None, reset_num_timesteps=False)
            assert self.env is not None
            self.collect_rollouts(self.env, callback, buffer, self.n_steps)
        return buffer.observations()
