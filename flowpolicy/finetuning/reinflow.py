"""ReinFlow (Zhang et al. 2025): PPO over the chain of a flow policy, for stable-baselines3 users."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from flowpolicy.errors import FlowPolicyError
from flowpolicy.finetuning.actor_critic import FlowActorCritic
from flowpolicy.finetuning.advantages import ReturnScale
from flowpolicy.finetuning.buffer import ChunkBuffer
from flowpolicy.finetuning.chunk_env import ChunkEnv, ChunkStep, LocalChunks
from flowpolicy.finetuning.chunk_vec_env import VecEnvChunks
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.regularization import Regularizer
from flowpolicy.finetuning.update import PPO, Minibatch, UpdateRule
from flowpolicy.policy import FlowPolicy
from flowpolicy.settings import require

Schedule = float | Any


class ReinFlow(OnPolicyAlgorithm):
    """Fine-tunes a pretrained flow policy by practice.

    >>> model = ReinFlow(FlowPolicy.load("runs/hopper/checkpoint"), env)  # doctest: +SKIP
    >>> model.learn(500_000).deployed_policy().save("tuned")  # doctest: +SKIP

    Args:
        policy: the pretrained policy; it is trained in place.
        env: a Gymnasium environment, its id, or a stable-baselines3 ``VecEnv`` of raw environments.
        num_steps: K, which the tuned policy is then valid for.
        n_steps: chunks per environment and iteration, S.
        batch_size: chunks of a minibatch.
        n_epochs: passes over an iteration's chunks.
        learning_rate: of flow and noise, a number or a stable-baselines3 schedule.
        critic_learning_rate: likewise.
        gamma: discount per environment step: a chunk of n steps discounts gamma^n.
        gae_lambda: lambda per chunk.
        target_kl: nats per chunk, beyond which the policy rests until the next iteration; checked before
            every policy step. None never stops.
        critic_warmup: iterations in which only the critic learns.
        max_grad_norm: gradients are clipped to it.
        noise: the injected noise.
        update: the update rule.
        regularizers: further terms of the policy loss.
        critic_hidden: widths of the critic.
        execute_horizon: T_e; None takes the policy's own.
        seed: of everything random.

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
        n_epochs: int = 8,
        learning_rate: Schedule = 3e-4,
        critic_learning_rate: Schedule = 1e-3,
        gamma: float = 0.995,
        gae_lambda: float = 0.95,
        target_kl: float | None = 0.15,
        critic_warmup: int = 3,
        max_grad_norm: float = 1.0,
        noise: NoiseConfig | None = None,
        update: UpdateRule | None = None,
        regularizers: Sequence[Regularizer] = (),
        critic_hidden: tuple[int, ...] = (256, 256),
        execute_horizon: int | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
    ) -> None:
        for name, value in (("n_steps", n_steps), ("batch_size", batch_size), ("n_epochs", n_epochs)):
            require(value >= 1, name, value, "at least 1")
        require(0 < gamma <= 1, "gamma", gamma, "in (0, 1]")
        require(0 <= gae_lambda <= 1, "gae_lambda", gae_lambda, "in [0, 1]")
        require(target_kl is None or target_kl > 0, "target_kl", target_kl, "positive, or None")
        horizon = policy.execute_horizon if execute_horizon is None else execute_horizon
        require(
            1 <= horizon <= policy.action_horizon,
            "execute_horizon",
            horizon,
            "between 1 and the chunk length",
        )
        self.batch_size, self.n_epochs = batch_size, n_epochs
        self.critic_learning_rate, self.target_kl, self.critic_warmup = (
            critic_learning_rate,
            target_kl,
            critic_warmup,
        )
        self.noise = noise or NoiseConfig()
        self.update: UpdateRule = update or PPO()
        self.regularizers = tuple(regularizers)
        self.iteration = 0
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
                "critic_hidden": critic_hidden,
            },
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box,),
        )
        self._setup_model()

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.critic_schedule = FloatSchedule(self.critic_learning_rate)
        self.set_random_seed(self.seed)
        self.actor_critic = FlowActorCritic(self.observation_space, self.action_space, **self.policy_kwargs)
        self.actor_critic.to(self.device)
        self.policy = self.actor_critic  # type: ignore[assignment]
        self.generator = torch.Generator(self.device).manual_seed(self.seed or 0)
        self.actor_optimizer = torch.optim.Adam(
            self.actor_critic.actor_parameters(), lr=self.lr_schedule(1.0)
        )
        self.critic_optimizer = torch.optim.Adam(
            self.actor_critic.critic.parameters(), lr=self.critic_schedule(1.0)
        )
        self.chunks = self._chunk_env()
        self.rollout_buffer = ChunkBuffer()  # type: ignore[assignment]
        self.scale = ReturnScale(self.chunks.num_envs, self.gamma)
        self._histories: dict[str, np.ndarray] | None = None

    def _chunk_env(self) -> ChunkEnv:
        policy = self.actor_critic.flow_policy
        keys = tuple(policy.observation_shapes)
        assert isinstance(self.env, VecEnv)
        if type(self.env) is DummyVecEnv:  # its environments are here: step them without a detour
            return LocalChunks(self.env.envs, keys, policy.obs_horizon)

        def plan(histories: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
            return self.actor_critic.plan(histories, deterministic=False, generator=self.generator)

        return VecEnvChunks(self.env, keys, policy.obs_horizon, plan)

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: ChunkBuffer, n_rollout_steps: int
    ) -> bool:
        """Sample a chain per chunk, execute the chunk, record both; False where a callback stops training."""
        policy, networks = self.actor_critic.flow_policy, self.actor_critic
        rollout_buffer.reset()
        networks.flow.noise.set_bounds(*self.noise.bounds(1.0 - self._current_progress_remaining))
        if self._histories is None:
            self._histories = self.chunks.reset(self.seed)
        callback.on_rollout_start()
        observation = policy.normalize_observations(self._histories)
        for _ in range(n_rollout_steps):
            shape = (self.chunks.num_envs, policy.action_horizon, policy.action_dim)
            start = torch.randn(shape, generator=self.generator, device=self.device)
            chain = networks.flow.sample(observation, start, self.generator)
            actions = policy.action_normalizer.denormalize(chain.x[:, -1]).cpu().numpy()
            step = self.chunks.step(actions[:, : networks.execute_horizon])
            final = None
            if step.truncated.any():
                ends = {key: value[step.truncated] for key, value in step.final_observation.items()}
                final = policy.normalize_observations(ends)
            rollout_buffer.add(observation, chain, step, final)
            observation, self._histories = policy.normalize_observations(step.observation), step.observation
            self._record_episodes()
            if not self._count_steps(step, callback):
                return False
        self._after = observation
        callback.on_rollout_end()
        return True

    def _record_episodes(self) -> None:
        assert self.ep_info_buffer is not None
        assert self.ep_success_buffer is not None
        for episode in self.chunks.pop_episodes():
            self.ep_info_buffer.append({"r": episode.ret, "l": episode.length})
            if episode.success is not None:
                self.ep_success_buffer.append(episode.success)

    def _count_steps(self, step: ChunkStep, callback: BaseCallback) -> bool:
        """Let callbacks see each environment step of the chunk, as they would have one by one."""
        ended = step.terminated | step.truncated
        for i in range(step.rewards.shape[1]):
            live = step.executed > i
            if not live.any():
                break
            self.num_timesteps += int(live.sum())
            dones, rewards = ended & (step.executed == i + 1), step.rewards[:, i]
            infos: list[dict[str, Any]] = [{} for _ in dones]
            callback.update_locals({"dones": dones, "rewards": rewards, "infos": infos, "self": self})
            if not callback.on_step():
                return False
        return True

    def train(self) -> None:
        """Several epochs over the iteration's chunks: the critic always, the policy until the KL stop."""
        buffer: ChunkBuffer = self.rollout_buffer  # type: ignore[assignment]
        buffer.update_scale(self.scale)
        data = buffer.data(self.actor_critic.critic, self._after, self.scale, self.gamma, self.gae_lambda)
        advantage = (data.advantage - data.advantage.mean()) / (data.advantage.std() + 1e-8)
        data = dataclasses.replace(data, advantage=advantage)
        self._update_rates()
        learns, losses, found = self.iteration >= self.critic_warmup, [], list[dict[str, float]]()
        for _ in range(self.n_epochs):
            order = torch.randperm(len(data), generator=self.generator, device=self.device)
            for rows in torch.split(order, self.batch_size):
                if len(rows) < self.batch_size and len(data) > self.batch_size:
                    continue  # a remnant would be a noisier step than the others
                batch = data[rows]
                losses.append(self._critic_step(batch))
                if learns:
                    metrics, learns = self._policy_step(batch)
                    found.append(metrics)
        steps = len(found) - (
            bool(found) and not learns
        )  # the last one only measured that it is time to rest
        self._log(found, steps, losses, data)
        self.iteration += 1
        self._n_updates += steps

    def _log(self, found: list[dict[str, float]], steps: int, losses: list[float], data: Minibatch) -> None:
        for name in found[0] if found else ():
            self.logger.record(name, float(np.mean([metrics[name] for metrics in found if name in metrics])))
        if found:
            self.logger.record("train/kl_last", found[-1]["train/kl"])
        self.logger.record("train/policy_steps", steps)
        self.logger.record("train/value_loss", float(np.mean(losses)))
        with torch.no_grad():
            residual = data.returns - self.actor_critic.critic(data.observation)
        self.logger.record("train/explained_variance", 1 - float(residual.var() / data.returns.var()))
        self.logger.record("train/return_scale", self.scale.value)

    def _update_rates(self) -> None:
        left = self._current_progress_remaining
        for optimizer, schedule in (
            (self.actor_optimizer, self.lr_schedule),
            (self.critic_optimizer, self.critic_schedule),
        ):
            for group in optimizer.param_groups:
                group["lr"] = schedule(left)
        self.logger.record("train/learning_rate", self.lr_schedule(left))

    def _critic_step(self, batch: Minibatch) -> float:
        critic = self.actor_critic.critic
        loss = ((critic(batch.observation) - batch.returns) ** 2).mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), self.max_grad_norm)
        self.critic_optimizer.step()
        return float(loss.detach())

    def _policy_step(self, batch: Minibatch) -> tuple[dict[str, float], bool]:
        """One step of flow and noise; none, and False, where they have moved too far already."""
        flow, parameters = self.actor_critic.flow, self.actor_critic.actor_parameters()
        loss, found = self.update.loss(flow, batch)
        metrics = {name: float(value.detach()) for name, value in found.items()}
        if self.target_kl is not None and metrics["train/kl"] > self.target_kl:
            return metrics, False
        for term in self.regularizers:
            value = term.loss(flow, batch, self.generator)
            loss = loss + term.weight * value
            metrics[f"train/{term.name}"] = float(value.detach())
        if not math.isfinite(float(loss.detach())):
            raise FlowPolicyError(
                f"The policy loss is not finite after {self.num_timesteps:,} steps; lower learning_rate."
            )
        self.actor_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        metrics["train/gradient_norm"] = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        self.actor_optimizer.step()
        return metrics, True

    def deployed_policy(self) -> FlowPolicy:
        """The plain flow without its noise network, marked with the K it is tuned for."""
        policy = self.actor_critic.flow_policy
        config = dataclasses.replace(policy.config, tuned_num_steps=self.actor_critic.flow.num_steps)
        result = FlowPolicy(config).to(self.device)
        result.load_state_dict(policy.state_dict())
        result.refresh_normalizers()
        return result.eval()
