"""ReinFlow (Zhang et al. 2025): PPO over the chain of a flow policy, for stable-baselines3 users."""

from __future__ import annotations

import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import torch
from gymnasium import spaces
from stable_baselines3.common.utils import FloatSchedule

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.finetuning.acting import spaces_of
from flowpolicy.finetuning.actor_critic import NETWORK_SETTINGS, FlowActorCritic
from flowpolicy.finetuning.advantages import GAE, AdvantageStrategy
from flowpolicy.finetuning.algorithm import ChunkAlgorithm
from flowpolicy.finetuning.archive import taking_over
from flowpolicy.finetuning.buffer import ChunkBuffer
from flowpolicy.finetuning.chain import NoisyFlow, chain_steps
from flowpolicy.finetuning.config import check_settings
from flowpolicy.finetuning.group_advantages import GroupAdvantages
from flowpolicy.finetuning.learner import Learner
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.regularization import Regularizer
from flowpolicy.finetuning.rules import PPO, UpdateRule
from flowpolicy.finetuning.saving import ReinFlowProgress, SavedModel, read_model, write_model
from flowpolicy.finetuning.stable_baselines3 import refuse_other_environments
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import require

Schedule = float | Any
_UNSAVED = (
    "self", "__class__", "return", "policy", "env", "device", "processes", "regularizers", "reference",
)  # fmt: skip
"""What is no setting of the constructor that a file holds."""


class ReinFlow(ChunkAlgorithm):
    """Fine-tunes a pretrained flow policy by reinforcement learning in its environment.

    >>> model = ReinFlow(FlowPolicy.load("runs/hopper/checkpoint"), env)  # doctest: +SKIP
    >>> model.learn(500_000).deployed_policy().save("tuned")  # doctest: +SKIP

    Args:
        policy: the pretrained policy; it is trained in place.
        env: a Gymnasium environment, its id, or a stable-baselines3 ``VecEnv`` of raw environments; None for
            prediction alone.
        num_steps: K, which the tuned policy is then valid for; None takes the one that ``policy`` is tuned
            for, or 4.
        grid: ``name`` and settings of the grid of flow times, likewise; None takes the one that the
            policy was tuned for, or else the uniform one.
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
        advantages: how good a chunk was; None takes :class:`~flowpolicy.finetuning.advantages.GAE` of
            ``gamma`` and ``gae_lambda``, or for an update rule that compares chunks of a group
            :class:`~flowpolicy.finetuning.group_advantages.GroupAdvantages`.
        reference: the pretrained policy, for update rules that look at it; None takes ``policy`` as it is.
        regularizers: further terms of the policy loss.
        critic_hidden: widths of the critic.
        image_encoder: ``frozen`` leaves the image encoders as they were pretrained, and encodes each
            image once; ``trained`` fine-tunes it too. It has no effect without images.
        critic_encoder: ``shared``: the critic reads the policy's image tokens; ``own``: it starts from a copy
            of the policy's image encoders and trains it.
        ema_decay: of an average of the policy's weights after each iteration, which is what is deployed;
            None deploys the last ones.
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
        num_steps: int | None = None,
        grid: dict[str, Any] | None = None,
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
        advantages: AdvantageStrategy | None = None,
        reference: FlowPolicy | None = None,
        regularizers: Sequence[Regularizer] = (),
        critic_hidden: tuple[int, ...] = (256, 256),
        image_encoder: str = "frozen",
        critic_encoder: str = "shared",
        ema_decay: float | None = None,
        execute_horizon: int | None = None,
        processes: Processes | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
    ) -> None:
        settings: dict[str, Any] = {k: v for k, v in locals().items() if k not in _UNSAVED}
        if not isinstance(policy, FlowPolicy):
            raise ConfigError(
                f"policy is {policy!r}; it must be a FlowPolicy, as FlowPolicy.load() gives it."
            )
        refuse_other_environments(env)
        horizon = policy.spec.execute_horizon if execute_horizon is None else execute_horizon
        allowed = "between 1 and the chunk length"
        require(1 <= horizon <= policy.spec.action_horizon, "execute_horizon", horizon, allowed)
        settings["execute_horizon"] = horizon
        settings["num_steps"] = chain_steps(policy, num_steps)
        settings["critic_hidden"] = tuple(critic_hidden)
        settings["noise"], settings["update"] = noise or NoiseConfig(), update or PPO()
        if advantages is None:
            del settings["advantages"]
        check_settings(settings)
        self.settings = settings
        self.reference = reference
        self.batch_size, self.n_epochs = batch_size, n_epochs
        self.critic_learning_rate = critic_learning_rate
        self.noise: NoiseConfig = self.settings["noise"]
        self.update: UpdateRule = self.settings["update"]
        if advantages is None:
            advantages = (GroupAdvantages if self.update.needs_groups else GAE)(gamma, gae_lambda)
        self.advantages: AdvantageStrategy = advantages
        self.group_size = getattr(advantages, "group_size", 1)
        self.branch_length = getattr(advantages, "branch_length", 1)
        allowed = f"of groups, since update={self.update.name} compares the chunks of one"
        require(self.group_size > 1 or not self.update.needs_groups, "advantages", advantages, allowed)
        allowed = f"a multiple of the {self.branch_length} chunks of a branch"
        require(n_steps % self.branch_length == 0, "n_steps", n_steps, allowed)
        allowed = f"null, since update={self.update.name} moves the policy in one iteration alone"
        require(ema_decay is None or not self.update.offline, "ema_decay", ema_decay, allowed)
        self.regularizers = tuple(regularizers)
        self.lost_regularizers: tuple[str, ...] = ()  # a loaded model's, until they are given again
        self.processes = processes or Processes()
        share = self.processes.count
        require(batch_size % share == 0, "batch_size", batch_size, f"a multiple of {share} processes")
        self.seconds = {"simulation": 0.0, "inference": 0.0, "update": 0.0}
        self.restarts_before = 0  # of worker processes, before this model was loaded
        super().__init__(
            policy=FlowActorCritic,  # type: ignore[arg-type]
            env=env, learning_rate=learning_rate, n_steps=n_steps, gamma=gamma, gae_lambda=gae_lambda,
            ent_coef=0.0, vf_coef=1.0, max_grad_norm=max_grad_norm, use_sde=False, sde_sample_freq=-1,
            stats_window_size=stats_window_size, tensorboard_log=tensorboard_log,
            policy_kwargs={
                "flow_policy": policy, "injects_noise": self.update.injects_noise,
                "branches": self.update.branches,
                **{name: settings[name] for name in NETWORK_SETTINGS},
            },
            verbose=verbose, seed=seed, device=device, _init_setup_model=False,
            supported_action_spaces=(spaces.Box,),
        )  # fmt: skip
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
        reference = None
        if self.update.needs_reference:
            pretrained = self.reference or self.actor_critic.flow_policy
            flow = NoisyFlow(pretrained, self.settings["num_steps"], self.noise, self.settings["grid"])
            reference = flow.frozen_copy().to(self.device)  # the user's policy stays where it is
        self.learner = Learner(
            self.actor_critic, self.update, self.regularizers, advantages=self.advantages,
            group_size=self.group_size, num_envs=self.n_envs, target_kl=self.settings["target_kl"],
            critic_warmup=self.settings["critic_warmup"], adaptive_rate=self.settings["adaptive_rate"],
            max_grad_norm=self.max_grad_norm, reference=reference, processes=self.processes,
            generator=self.generator,
        )  # fmt: skip
        self.learner.start_iteration(self.lr_schedule(1.0), self.critic_schedule(1.0))
        self.rollout_buffer = ChunkBuffer()  # type: ignore[assignment]
        if self.env is not None:
            self._adopt(self.env)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        if self.lost_regularizers:
            raise ConfigError(
                f"The saved model was trained with the regularizer {', '.join(self.lost_regularizers)}; give "
                "load() regularizers=(...) again before it learns on."
            )
        if self.update.offline:
            self.rollout_buffer.reset()
        return super()._setup_learn(*args, **kwargs)

    @property
    def gathers(self) -> bool:
        """See :class:`ChunkLearning`."""
        return self.update.offline and self.num_timesteps < self._total_timesteps

    def train(self) -> None:
        """Learn from the iteration's chunks; see :meth:`Learner.train`."""
        started = time.perf_counter()
        left = 1.0 if self.update.offline else self._current_progress_remaining
        metrics = self.learner.train(
            self.rollout_buffer,  # type: ignore[arg-type]
            self.collector.after,
            policy_rate=self.lr_schedule(left),
            critic_rate=self.critic_schedule(left),
            batch_size=self.batch_size,
            n_epochs=1 if self.gathers else self.n_epochs,  # more chunks each time
            policy_waits=self.gathers,
        )
        for name, value in metrics.items():
            self.logger.record(name, value)
        self._n_updates = self.learner.updates
        self.seconds["update"] += time.perf_counter() - started

    def _write(self, path: str | Path | IO[bytes]) -> None:
        tensors, numbers = self.learner.state()
        progress = ReinFlowProgress(**self.progress_numbers(), **numbers)
        model = SavedModel(
            self.actor_critic.flow_policy.config, self.settings,
            (*self.lost_regularizers, *(term.name for term in self.regularizers)), progress,
            {**tensors, **self.bounds()},
        )  # fmt: skip
        write_model(model, path)

    @classmethod
    def _read(
        cls,
        path: str | Path | IO[bytes],
        env: Any,
        device: torch.device | str,
        replaced: dict[str, Any],
    ) -> Self:
        hints = typing.get_type_hints(cls.__init__)
        saved = read_model(path, {k: v for k, v in hints.items() if k not in _UNSAVED}, replaced)
        if saved.settings["update"].needs_reference and replaced.get("reference") is None:
            raise CheckpointError(
                f"{path} was trained with a rule that looks at the pretrained policy; give load() "
                "reference=... again."
            )
        try:
            model = cls(FlowPolicy(saved.policy), env, device=device, **saved.settings)
        except ConfigError as error:
            if replaced:
                raise
            raise CheckpointError(f"{path} does not describe a ReinFlow model: {error}") from error
        given = {term.name for term in model.regularizers}
        model.lost_regularizers = tuple(name for name in saved.regularizers if name not in given)
        with taking_over(path):
            model._take_over(saved)
            model.actor_critic.flow_policy.check_normalizers(path)
        return model

    def _take_over(self, saved: SavedModel) -> None:
        progress, place = saved.progress, ("chains", self.processes.rank, saved.progress.iteration)
        self.learner.load_state(saved.tensors, vars(progress), derived_seed(self.seed or 0, *place))
        self.go_on_from(progress, saved.tensors)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["actor_critic", "learner.actor_optimizer", "learner.critic_optimizer"], []
