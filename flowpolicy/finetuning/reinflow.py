"""ReinFlow (Zhang et al. 2025): PPO over the chain of a flow policy, for stable-baselines3 users."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import FloatSchedule, get_system_info
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecTransposeImage

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.episodes import EpisodeRecord
from flowpolicy.evaluation.rollout import check_spaces
from flowpolicy.finetuning.actor_critic import FlowActorCritic, spaces_of
from flowpolicy.finetuning.advantages import (
    LARGEST_ADVANTAGE,
    LEAST_ADVANTAGE,
    ReturnScale,
    RunningMoments,
    moments_of,
    returns_differ,
)
from flowpolicy.finetuning.buffer import ChunkBuffer
from flowpolicy.finetuning.environments import ChunkEnv, ChunkStep, LocalChunks
from flowpolicy.finetuning.learner import Learner
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.regularization import Regularizer
from flowpolicy.finetuning.saving import read_model, write_model
from flowpolicy.finetuning.stable_baselines3 import ChunkedVecEnv, VecEnvChunks, refuse_other_environments
from flowpolicy.finetuning.update import PPO, UpdateRule
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import require

Schedule = float | Any
MOST = 10_000_000
"""Chunks of a buffer or a minibatch, passes over it, episodes that are averaged."""
ENCODING, CRITIC_ENCODING = ("frozen", "trained"), ("shared", "own")


class ReinFlow(OnPolicyAlgorithm):
    """Fine-tunes a pretrained flow policy by practice.

    >>> model = ReinFlow(FlowPolicy.load("runs/hopper/checkpoint"), env)  # doctest: +SKIP
    >>> model.learn(500_000).deployed_policy().save("tuned")  # doctest: +SKIP

    Args:
        policy: the pretrained policy; it is trained in place.
        env: a Gymnasium environment, its id, or a stable-baselines3 ``VecEnv`` of raw environments; None for
            prediction alone.
        num_steps: K, which the tuned policy is then valid for.
        n_steps: chunks per environment and iteration, S.
        batch_size: chunks of a minibatch.
        n_epochs: passes over an iteration's chunks.
        learning_rate: of flow and noise, a number or a stable-baselines3 schedule.
        critic_learning_rate: likewise.
        adaptive_rate: multiply the learning rate of flow and noise by a factor that follows the KL stop: an
            iteration stopped before a quarter of its minibatches lowers it, one that ran through raises it,
            up to 1 again.
        gamma: discount per environment step: a chunk of n steps discounts gamma^n.
        gae_lambda: lambda per chunk.
        target_kl: nats per chunk, beyond which the policy rests until the next iteration; checked before
            every policy step. A step that went beyond twice as far is taken back. None never stops.
        critic_warmup: iterations in which only the critic learns.
        max_grad_norm: gradients are clipped to it.
        noise: the injected noise.
        update: the update rule.
        regularizers: further terms of the policy loss.
        critic_hidden: widths of the critic.
        image_encoder: ``frozen`` leaves what the policy sees in images as it was pretrained, and encodes each
            image once; ``trained`` lets practice change it. Without images it means nothing.
        critic_encoder: ``shared``: the critic reads the policy's image tokens; ``own``: it starts from a copy
            of the policy's image encoders and trains it.
        execute_horizon: T_e; None takes the policy's own.
        seed: of everything random.
        processes: this process among many that share gradients; each has environments of its own, equally
            many, and ``batch_size`` counts the chunks of all.

    Attributes:
        num_timesteps: environment steps, of all processes.
        iteration: iterations done.
        seconds: wall time spent in ``simulation``, ``inference`` and ``update`` since construction.

    Raises:
        ConfigError: a setting out of range, or a policy that is no flow or has no K steps.
        TaskError: spaces that do not fit the policy.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        env: Any,
        *,
        num_steps: int = 4,
        n_steps: int = 128,
        batch_size: int = 512,
        n_epochs: int = 4,
        learning_rate: Schedule = 3e-4,
        critic_learning_rate: Schedule = 1e-3,
        adaptive_rate: bool = True,
        gamma: float = 0.995,
        gae_lambda: float = 0.95,
        target_kl: float | None = 0.15,
        critic_warmup: int = 3,
        max_grad_norm: float = 1.0,
        noise: NoiseConfig | None = None,
        update: UpdateRule | None = None,
        regularizers: Sequence[Regularizer] = (),
        critic_hidden: tuple[int, ...] = (256, 256),
        image_encoder: str = "frozen",
        critic_encoder: str = "shared",
        execute_horizon: int | None = None,
        processes: Processes | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
    ) -> None:
        counts = {"n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs}
        for name, value in (counts | {"stats_window_size": stats_window_size}).items():
            require(1 <= value <= MOST, name, value, f"at least 1 and at most {MOST:,}")
        if not isinstance(policy, FlowPolicy):
            raise ConfigError(
                f"policy is {policy!r}; it must be a FlowPolicy, as FlowPolicy.load() gives it."
            )
        refuse_other_environments(env)
        require(0 < gamma <= 1, "gamma", gamma, "in (0, 1]")
        require(0 <= gae_lambda <= 1, "gae_lambda", gae_lambda, "in [0, 1]")
        require(target_kl is None or target_kl > 0, "target_kl", target_kl, "positive, or None")
        require(image_encoder in ENCODING, "image_encoder", image_encoder, "frozen or trained")
        require(critic_encoder in CRITIC_ENCODING, "critic_encoder", critic_encoder, "shared or own")
        require(critic_warmup >= 0, "critic_warmup", critic_warmup, "0 or more")
        require(max_grad_norm > 0, "max_grad_norm", max_grad_norm, "positive")
        require(seed is None or 0 <= seed < 2**31, "seed", seed, "between 0 and 2^31, or None")
        is_net = len(critic_hidden) <= 16 and all(1 <= width <= 8192 for width in critic_hidden)
        require(is_net, "critic_hidden", critic_hidden, "at most 16 widths between 1 and 8192")
        horizon = policy.execute_horizon if execute_horizon is None else execute_horizon
        require(
            1 <= horizon <= policy.action_horizon,
            "execute_horizon",
            horizon,
            "between 1 and the chunk length",
        )
        self.settings: dict[str, Any] = {
            "num_steps": num_steps, "n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs,
            "learning_rate": learning_rate, "critic_learning_rate": critic_learning_rate,
            "adaptive_rate": adaptive_rate, "gamma": gamma,
            "gae_lambda": gae_lambda, "target_kl": target_kl, "critic_warmup": critic_warmup,
            "max_grad_norm": max_grad_norm, "noise": noise or NoiseConfig(), "update": update or PPO(),
            "critic_hidden": tuple(critic_hidden), "image_encoder": image_encoder,
            "critic_encoder": critic_encoder, "execute_horizon": horizon,
            "stats_window_size": stats_window_size, "tensorboard_log": tensorboard_log, "verbose": verbose,
            "seed": seed,
        }  # fmt: skip
        self.batch_size, self.n_epochs = batch_size, n_epochs
        self.critic_learning_rate = critic_learning_rate
        self.critic_warmup, self.adaptive_rate = critic_warmup, adaptive_rate
        self.noise: NoiseConfig = self.settings["noise"]
        self.update: UpdateRule = self.settings["update"]
        self.regularizers = tuple(regularizers)
        self.lost_regularizers: tuple[str, ...] = ()  # a loaded model's, until they are given again
        self.processes = processes or Processes()
        share = self.processes.count
        require(batch_size % share == 0, "batch_size", batch_size, f"a multiple of {share} processes")
        self.iteration = 0
        self.seconds = {"simulation": 0.0, "inference": 0.0, "update": 0.0}
        self.restarts_before = 0  # of worker processes, before this model was loaded
        super().__init__(
            policy=FlowActorCritic,  # type: ignore[arg-type]
            env=env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=0.0,
            vf_coef=1.0,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs={
                "flow_policy": policy,
                "num_steps": num_steps,
                "execute_horizon": horizon,
                "noise": self.noise,
                "critic_hidden": tuple(critic_hidden),
                "image_encoder": image_encoder,
                "critic_encoder": critic_encoder,
            },
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box,),
        )
        if env is None:
            self.observation_space, self.action_space = spaces_of(policy)
            self.n_envs = 1
        self._setup_model()

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.critic_schedule = FloatSchedule(self.critic_learning_rate)
        rank = self.processes.rank
        self.set_random_seed(None if self.seed is None else derived_seed(self.seed, "networks", rank))
        assert isinstance(self.action_space, spaces.Box)
        networks = FlowActorCritic(self.observation_space, self.action_space, **self.policy_kwargs)
        self.actor_critic = networks.to(self.device)
        self.policy = self.actor_critic  # type: ignore[assignment]
        self.processes.share(networks.state_dict().values())
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(derived_seed(self.seed or 0, "chains", rank))
        self.learner = Learner(
            self.actor_critic, self.update, self.regularizers, target_kl=self.settings["target_kl"],
            max_grad_norm=self.max_grad_norm, processes=self.processes, generator=self.generator,
        )  # fmt: skip
        self.learner.start_iteration(self.lr_schedule(1.0), self.critic_schedule(1.0))
        self.rollout_buffer = ChunkBuffer()  # type: ignore[assignment]
        self.scale = ReturnScale(self.n_envs, self.gamma)
        if self.env is not None:
            self._adopt(self.env)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As stable-baselines3 does, but images keep their channels last."""
        wrapped = OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        while isinstance(wrapped, VecTransposeImage):
            wrapped = wrapped.venv
        return wrapped

    def _adopt(self, env: VecEnv) -> None:
        """Execute chunks in ``env`` from now on; every episode starts anew."""
        if self._vec_normalize_env is not None:
            raise ConfigError(
                "The environment is in a VecNormalize, and the policy normalises by itself; leave it out."
            )
        policy = self.actor_critic.flow_policy
        check_spaces(env, policy, "The environment")
        keys = tuple(policy.observation_shapes)
        self._histories: dict[str, NDArray[Any]] | None = None
        self.scale.running = np.zeros(env.num_envs)
        self.chunks: ChunkEnv
        if isinstance(env, ChunkedVecEnv):
            self.chunks = env.chunks
        elif type(env) is DummyVecEnv:  # its environments are here: step them without a detour
            self.chunks = LocalChunks(env.envs, keys, policy.obs_horizon)
        else:

            def plan(histories: dict[str, NDArray[Any]], rows: NDArray[Any]) -> NDArray[Any]:
                chunks = self.actor_critic.plan(histories, deterministic=False, generator=self.generator)
                return chunks[:, : self.actor_critic.execute_horizon]

            self.chunks = VecEnvChunks(env, keys, policy.obs_horizon, plan)

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
        if self.lost_regularizers:
            raise ConfigError(
                f"The saved model was trained with the regularizer {', '.join(self.lost_regularizers)}; give "
                "load() regularizers=(...) again before it learns on."
            )
        before = self._last_obs
        result = super()._setup_learn(*args, **kwargs)
        if self._last_obs is not before:  # the environments were reset
            self._histories = None
            self.scale.running = np.zeros(self.n_envs)
        if isinstance(self.chunks, VecEnvChunks):
            self.chunks.on_step = functools.partial(self._on_step, result[1])
        return result

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: ChunkBuffer, n_rollout_steps: int
    ) -> bool:
        """Sample a chain per chunk, execute the chunk, record both; False where a callback stops training."""
        policy, networks = self.actor_critic.flow_policy, self.actor_critic
        rollout_buffer.reset()
        self._update_current_progress_remaining(self.num_timesteps, max(1, self._total_timesteps))
        networks.flow.noise.set_bounds(*self.noise.bounds(1.0 - self._current_progress_remaining))
        if self._histories is None:
            self._histories = self._first_histories()
        callback.on_rollout_start()
        before, goes_on = self.num_timesteps, True
        observation = networks.prepare(policy.normalize_observations(self._histories))
        shape = (self.n_envs, policy.action_horizon, policy.action_dim)
        for _ in range(n_rollout_steps):
            started = time.perf_counter()
            start = torch.randn(shape, generator=self.generator, device=self.device)
            chain = networks.flow.sample(observation, start, self.generator)
            actions = policy.action_normalizer.denormalize(chain.x[:, -1]).cpu().numpy()
            planned = time.perf_counter()
            step = self.chunks.step(actions[:, : networks.execute_horizon])
            self.seconds["inference"] += planned - started
            self.seconds["simulation"] += time.perf_counter() - planned
            final = None
            if step.truncated.any():
                ends = {key: value[step.truncated] for key, value in step.final_observation.items()}
                final = networks.prepare(policy.normalize_observations(ends))
            rollout_buffer.add(observation, chain, step, final)
            self._histories = step.observation
            observation = networks.prepare(policy.normalize_observations(step.observation))
            episodes = self.chunks.pop_episodes()
            self._record_episodes(episodes)
            if isinstance(self.chunks, VecEnvChunks):
                goes_on = not self.chunks.stopped
            else:
                goes_on = self._replay_steps(step, episodes, callback)
            if not goes_on:
                break
        self._after = observation
        everywhere = self.processes.gather(self.num_timesteps - before, float(goes_on))
        self.num_timesteps = before + int(sum(steps for steps, _ in everywhere))
        goes_on = all(flag for _, flag in everywhere)
        if goes_on:
            callback.on_rollout_end()
        return goes_on

    def _first_histories(self) -> dict[str, NDArray[Any]]:
        if isinstance(self.chunks, VecEnvChunks):  # learn() has reset it, with its seed
            return self.chunks.start_from(self._last_obs)
        if self.seed is None:
            return self.chunks.reset()
        return self.chunks.reset(derived_seed(self.seed, "episodes", self.processes.rank, self.iteration))

    def _record_episodes(self, episodes: list[EpisodeRecord]) -> None:
        assert self.ep_info_buffer is not None
        assert self.ep_success_buffer is not None
        for episode in episodes:
            self.ep_info_buffer.append({"r": episode.ret, "l": episode.length})
            if episode.success is not None:
                self.ep_success_buffer.append(episode.success)

    def _replay_steps(self, step: ChunkStep, episodes: list[EpisodeRecord], callback: BaseCallback) -> bool:
        """Let callbacks see each environment step of the chunk, as they would have one by one."""
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
            if not self._on_step(callback, step.rewards[:, i], dones, infos, int(live.sum())):
                return False
        return True

    def _on_step(
        self, callback: BaseCallback, rewards: Any, dones: Any, infos: Any, count: int | None = None
    ) -> bool:
        self.num_timesteps += self.n_envs if count is None else count
        callback.update_locals({"dones": dones, "rewards": rewards, "infos": infos, "self": self})
        return callback.on_step()

    def train(self) -> None:
        """Several epochs over the iteration's chunks: the critic always, the policy until the KL stop."""
        started = time.perf_counter()
        buffer: ChunkBuffer = self.rollout_buffer  # type: ignore[assignment]
        for moments in self.processes.gather(*buffer.return_moments(self.scale)):
            self.scale.merge(*moments)
        data = buffer.data(self.actor_critic.values, self._after, self.scale, self.gamma, self.gae_lambda)
        # Of what the critic said before it has seen these returns: the advantage is what it missed.
        self.logger.record("train/explained_variance", 1 - float(data.advantage.var() / data.returns.var()))
        advantage, strength = self._normalized(data.advantage)
        self.logger.record("train/advantage_strength", strength)
        data = dataclasses.replace(data, advantage=advantage)
        learner, left = self.learner, self._current_progress_remaining
        rate = learner.start_iteration(strength * self.lr_schedule(left), self.critic_schedule(left))
        self.logger.record("train/learning_rate", rate)
        moving = self.iteration >= self.critic_warmup and self._returns_differ(buffer)
        losses, found = [], list[dict[str, float]]()
        # Every chunk once an epoch, in minibatches of nearly one size: a small remnant is a noisy step.
        parts, policy_steps = max(1, round(len(data) * self.processes.count / self.batch_size)), 0
        for _ in range(self.n_epochs):
            order = torch.randperm(len(data), generator=self.generator, device=self.device)
            for rows in torch.tensor_split(order, parts):
                batch = data[rows]
                losses.append(learner.critic_step(batch))
                if moving:
                    metrics, moving = learner.policy_step(batch)
                    found.append(metrics)
                    policy_steps += moving
        if moving and policy_steps and learner.target_kl is not None:  # what the last step did, none has seen
            metrics, moving = learner.check(batch)
            found.append(metrics)
        policy_steps -= bool(found) and learner.overshot(found[-1])  # it was taken back
        if self.adaptive_rate and found:
            learner.adapt_rate(
                policy_steps / len(losses), stopped=not moving, overshot=learner.overshot(found[-1])
            )
        self._log(found, policy_steps, losses)
        self.iteration += 1
        self._n_updates += policy_steps
        self.seconds["update"] += time.perf_counter() - started

    def _returns_differ(self, buffer: ChunkBuffer) -> bool:
        """Whether this iteration says of any action, on any process, that it was better than another."""
        lowest, highest, terminated = zip(*self.processes.gather(*buffer.reward_range()), strict=True)
        return returns_differ(min(lowest), max(highest), is_terminated=any(terminated))

    def _normalized(self, advantage: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Advantages of zero mean over the iteration's chunks of all processes, and how strong they are.

        The strength, by which the learning rate is multiplied since Adam's steps do not shrink with the
        gradient, is their mean square, each counted up to ``LARGEST_ADVANTAGE``: 1, but less where they are
        below ``LEAST_ADVANTAGE`` of the return scale, or where a few chunks make up their variance.
        """
        overall = self._moments(advantage)
        normalized = (advantage.double() - overall.mean) / max(overall.std, LEAST_ADVANTAGE)
        counted = self._moments(normalized.abs().clamp(max=LARGEST_ADVANTAGE) ** 2)
        return normalized.float(), counted.mean

    def _moments(self, values: torch.Tensor) -> RunningMoments:
        """Over all processes."""
        overall = RunningMoments()
        for moments in self.processes.gather(*moments_of(values.double().cpu().numpy())):
            overall.merge(*moments)
        return overall

    def _log(self, found: list[dict[str, float]], steps: int, losses: list[float]) -> None:
        means = {
            name: float(np.mean([metrics[name] for metrics in found if name in metrics]))
            for name in (found[0] if found else ())
        }
        means["train/value_loss"] = float(np.mean(losses))
        for name, value in self.processes.averaged(means).items():
            self.logger.record(name, value)
        if found:
            self.logger.record("train/kl_last", found[-1]["train/kl"])
        self.logger.record("train/policy_steps", steps)
        self.logger.record("train/return_scale", self.scale.value)

    @property
    def worker_restarts(self) -> int:
        """Simulating processes that died and were replaced, over all resumed parts of a run."""
        return self.restarts_before + getattr(getattr(self, "chunks", None), "restarts", 0)

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

    def deployed_policy(self) -> FlowPolicy:
        """The plain flow without its noise network, marked with the K it is tuned for."""
        policy = self.actor_critic.flow_policy
        config = dataclasses.replace(
            policy.config,
            tuned_num_steps=self.actor_critic.flow.num_steps,
            tuned_solver="euler",
            execute_horizon=self.actor_critic.execute_horizon,  # tokens beyond it were never trained
        )
        result = FlowPolicy(config).to(self.device)
        result.load_state_dict(policy.state_dict())
        return result.eval()

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
        write_model(self, path)

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
    ) -> ReinFlow:
        """Read what :meth:`save` wrote.

        Args:
            path: of the file, with or without ``.zip``, or a binary stream.
            env: as in the constructor; None can predict, and learns after ``set_env``.
            device: of the networks.
            custom_objects: further ``settings``.
            print_system_info: print versions of the libraries.
            force_reset: of stable-baselines3's interface; episodes always start anew.
            settings: keyword arguments of the constructor that replace the saved ones; schedules that are
                functions and regularizers are not in the file and must be given again.

        Raises:
            CheckpointError: no such file, a damaged one, or one of something else.
        """
        if print_system_info:
            get_system_info()
        return read_model(cls, path, env, device, {**(custom_objects or {}), **settings})

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["actor_critic", "learner.actor_optimizer", "learner.critic_optimizer"], []
