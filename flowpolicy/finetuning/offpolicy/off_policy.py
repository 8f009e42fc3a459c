"""Off-policy fine-tuning of a flow policy, for stable-baselines3 users."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn, TrainFreq
from stable_baselines3.common.vec_env import VecEnv

from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.finetuning.acting import spaces_of
from flowpolicy.finetuning.advantages import ReturnScale
from flowpolicy.finetuning.algorithm import ChunkLearning
from flowpolicy.finetuning.archive import taking_over
from flowpolicy.finetuning.chain import chain_steps
from flowpolicy.finetuning.config import MOST
from flowpolicy.finetuning.offpolicy.algorithms import EXPO, Algorithm
from flowpolicy.finetuning.offpolicy.config import OffPolicySettings
from flowpolicy.finetuning.offpolicy.demonstrations import demonstrated
from flowpolicy.finetuning.offpolicy.learner import OffPolicyLearner
from flowpolicy.finetuning.offpolicy.networks import SteeredActor, steered
from flowpolicy.finetuning.offpolicy.replay import ChunkReplay, Transitions
from flowpolicy.finetuning.offpolicy.saving import OffPolicyProgress, SavedOffPolicy, read_model, write_model
from flowpolicy.finetuning.stable_baselines3 import refuse_other_environments
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.progress import progress
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import build, require

VISITED = 4096
"""Observations of the replay that a policy is distilled on."""
PREPARED = 512
"""Demonstrated observations that are looked at at once."""


class OffPolicy(ChunkLearning, OffPolicyAlgorithm):
    """Learns from a replay of executed chunks what to do with a pretrained flow policy's chunks.

    >>> model = OffPolicy(FlowPolicy.load("runs/door/checkpoint"), env, algorithm=EXPO())  # doctest: +SKIP
    >>> model.learn(100_000).deployed_policy().save("tuned")  # doctest: +SKIP

    Args:
        policy: the pretrained policy; it stays as it is.
        env: a Gymnasium environment, its id, or a stable-baselines3 ``VecEnv`` of raw environments; None for
            prediction alone.
        algorithm: what is learnt besides the critic; None takes :class:`EXPO` with its defaults.
        demonstrations: of which every batch has a share, with rewards; None learns from the replay alone.
        num_steps: K, which the tuned policy is then valid for; None takes the one that ``policy`` is tuned
            for, or 4.
        grid: ``name`` and settings of the grid of flow times, likewise; None takes the one that the
            policy was tuned for, or else the uniform one.
        execute_horizon: T_e; None takes the policy's own.
        seed: of everything random.
        settings: of :class:`~flowpolicy.finetuning.offpolicy.config.OffPolicySettings`.

    Attributes:
        num_timesteps: environment steps.
        iteration: iterations done, ``train_freq`` chunks of every environment each.
        seconds: wall time spent in ``simulation``, ``inference`` and ``update`` since construction.

    Raises:
        ConfigError: a setting out of range, or a policy that is no flow or has no K steps.
        DataError: demonstrations without rewards.
        TaskError: spaces that do not fit the policy.
    """

    actor_critic: SteeredActor
    replay_buffer: ChunkReplay  # type: ignore[assignment]

    def __init__(
        self,
        policy: FlowPolicy,
        env: Any,
        *,
        algorithm: Algorithm | None = None,
        demonstrations: Demonstrations | None = None,
        num_steps: int | None = None,
        grid: dict[str, Any] | None = None,
        execute_horizon: int | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        **settings: Any,
    ) -> None:
        if not isinstance(policy, FlowPolicy):
            raise ConfigError(
                f"policy is {policy!r}; it must be a FlowPolicy, as FlowPolicy.load() gives it."
            )
        refuse_other_environments(env)
        require(1 <= stats_window_size <= MOST, "stats_window_size", stats_window_size, f"1 to {MOST}")
        require(seed is None or 0 <= seed < 2**31, "seed", seed, "between 0 and 2^31, or None")
        horizon = policy.spec.execute_horizon if execute_horizon is None else execute_horizon
        allowed = "between 1 and the chunk length"
        require(1 <= horizon <= policy.spec.action_horizon, "execute_horizon", horizon, allowed)
        self.settings = shared = build(OffPolicySettings, settings, "offpolicy")
        self.algorithm = algorithm or EXPO()
        self.demonstrations, self.lost_demonstrations = demonstrations, False
        wanted = SamplerSpec(num_steps=chain_steps(policy, num_steps), solver="euler", grid=grid)
        self.sampling = policy.checked(wanted, allow_any_steps=True)
        steering = self.algorithm.steering(shared.members, shared.critic_hidden)
        torch_seed = None if seed is None else derived_seed(seed, "networks")
        with torch.random.fork_rng(devices=[]):
            if torch_seed is not None:
                torch.manual_seed(torch_seed)
            self.flow_policy = steered(policy, steering, horizon)
        self.processes, self.restarts_before, self.iterations = Processes(), 0, 0
        self.seconds = {"simulation": 0.0, "inference": 0.0, "update": 0.0}
        super().__init__(
            policy=SteeredActor,
            env=env, learning_rate=shared.learning_rate, buffer_size=shared.buffer_size,
            learning_starts=shared.learning_starts, batch_size=shared.batch_size, tau=shared.tau,
            gamma=shared.gamma, train_freq=shared.train_freq, gradient_steps=-1,
            stats_window_size=stats_window_size, tensorboard_log=tensorboard_log, verbose=verbose,
            device=device, support_multi_env=True, seed=seed, sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )  # fmt: skip
        if env is None:
            self.observation_space, self.action_space = spaces_of(policy)
            self.n_envs = 1
        self._setup_model()

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self._convert_train_freq()
        self.set_random_seed(None if self.seed is None else derived_seed(self.seed, "networks"))
        assert isinstance(self.action_space, spaces.Box)
        shared = self.settings
        networks = SteeredActor(
            self.observation_space, self.action_space, flow_policy=self.flow_policy,
            algorithm=self.algorithm, sampling=self.sampling, members=shared.members,
            hidden=shared.critic_hidden,
        )  # fmt: skip
        self.actor_critic = networks.to(self.device)
        self.policy = self.actor_critic
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(derived_seed(self.seed or 0, "chunks"))
        self.learner = OffPolicyLearner(
            networks, self.algorithm, shared, num_envs=self.n_envs, generator=self.generator
        )
        self.replay_buffer = self._replay(shared.buffer_size)
        self.demonstrated: ChunkReplay | None = None
        if self.env is not None:
            self._adopt(self.env)

    def _replay(self, capacity: int, stride: int | None = None) -> ChunkReplay:
        networks = self.actor_critic
        return ChunkReplay(
            capacity, self.observation_space, self.action_space, self.device, self.n_envs, gamma=self.gamma,
            known=networks.known, generator=self.generator, executed=networks.executed,
            n_steps=self.settings.n_steps, stride=stride,
        )  # fmt: skip

    def _adopt(self, env: VecEnv) -> None:
        super()._adopt(env)
        self.actor_critic.adopt_bounds()
        self.replay_buffer.forget_waiting()

    def adopt_robot(self, low: Any, high: Any) -> None:
        """Learn, in place of an environment, from a robot whose episodes :meth:`take` is given.

        A chunk of the replay begins at each of its steps.

        Args:
            low: least of its commands, ``(A,)``.
            high: largest.
        """
        self.replay_buffer.stride = self.actor_critic.execute_horizon
        self.action_space = self.actor_critic.action_space = spaces.Box(low, high, dtype=np.float32)
        self.actor_critic.adopt_bounds()

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.iterations

    @property
    def scale(self) -> ReturnScale:
        """By which rewards are divided."""
        return self.learner.scale

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        if self.lost_demonstrations and self.demonstrations is None:
            raise ConfigError(
                "The saved model learnt from demonstrations too; give load() demonstrations=... again "
                "before it learns on."
            )
        result = super()._setup_learn(*args, **kwargs)
        if self.collector.histories is None:
            self.replay_buffer.forget_waiting()
        self.adopt_demonstrations()
        return result

    def adopt_demonstrations(self) -> None:
        """Look at the demonstrations, if there are any, and learn from them alone where that is wanted."""
        if self.demonstrated is not None or self.demonstrations is None:
            return
        parts = list(self._cut(self.demonstrations))
        if not self.learner.updates:  # of a loaded model's scale they are a part already
            self._observe_rewards(self.demonstrations)
        self.demonstrated = shown = self._replay(sum(map(len, parts)), self.actor_critic.execute_horizon)
        for part in parts:
            shown.put(part)
        offline = self.settings.offline_updates - self.learner.updates
        if offline > 0 and not self.num_timesteps:
            started = time.perf_counter()
            for _ in progress(offline, "learn from demonstrations"):
                self.learner.train(lambda: shown.sample(self.batch_size), 1, is_online=False)
            self.seconds["update"] += time.perf_counter() - started

    def take(self, episode: Demonstrations, succeeded: bool = False) -> None:
        """Keep an episode of the robot that was adopted, a success or not.

        One that was cut off within its first chunk counts, but teaches nothing: what follows is not known.

        Raises:
            DataError: it has no rewards.
        """
        horizon = self.actor_critic.execute_horizon
        if episode.num_steps > horizon or episode.arrays["terminated"][-1]:
            for part in self._cut(episode, succeeded):
                self.replay_buffer.put(part)
            self._observe_rewards(episode)
        self.num_timesteps += episode.num_steps
        self.iterations += 1

    def _observe_rewards(self, demos: Demonstrations) -> None:
        rewards = demos.arrays["reward"].reshape(-1, 1, 1).astype(np.float64)
        ended = np.zeros((len(rewards), 1), bool)
        ended[demos.episode_ends - 1] = True
        moments = ReturnScale(1, self.gamma).run(rewards, np.ones((len(rewards), 1), np.int64), ended)
        self.learner.observe(moments, rewards)

    def _cut(self, demos: Demonstrations, succeeded: bool = True) -> Iterator[Transitions]:
        """Episodes as transitions, with what the algorithm knows of them."""
        networks = self.actor_critic
        cut = demonstrated(networks.flow_policy, demos, networks.execute_horizon, self.gamma, succeeded)
        tensors = cut.tensors()
        for start in range(0, len(cut), PREPARED):
            part = Transitions.of({name: value[start : start + PREPARED] for name, value in tensors.items()})
            after = networks.prepare(part.next_observation)
            yield Transitions(
                networks.prepare(part.observation), part.chunk, part.executed, part.reward, part.discount,
                part.is_last, part.succeeded, after, networks.known(after, self.generator),
            )  # fmt: skip

    def collect_rollouts(  # type: ignore[override]
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ChunkReplay,
        action_noise: Any = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """Execute ``train_freq`` chunks in every environment; its ``episode_timesteps`` are updates to do."""
        if log_interval is not None and self.iterations and self.iterations % log_interval == 0:
            self.dump_logs()
        self._update_current_progress_remaining(self.num_timesteps, max(1, self._total_timesteps))
        steps = _Steps(replay_buffer)
        # A critic of demonstrations alone does not know what fails (warm-up: Zhou et al. 2025, "WSRL").
        self.actor_critic.follows_flow = self.num_timesteps < self.settings.learning_starts
        try:
            goes_on = self._collect(callback, steps, train_freq.frequency)
        finally:
            self.actor_critic.follows_flow = False
        if steps.seen:
            self.learner.observe(self.scale.run(*steps.arrays()), steps.arrays()[0])
        self.iterations += 1
        return RolloutReturn(round(self.settings.utd * len(steps.seen) * self.n_envs), 0, goes_on)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Updates from the replay and the demonstrations."""
        if not self.replay_buffer.size():
            return
        for name, value in self.update(gradient_steps, batch_size).items():
            self.logger.record(name, value)

    def update(self, count: int, batch_size: int) -> dict[str, float]:
        """See :meth:`train`; means of the metrics."""
        started = time.perf_counter()
        metrics = self.learner.train(lambda: self._batch(batch_size), count)
        if self.algorithm.flow_changes:
            for each in (self.replay_buffer, self.demonstrated):
                if each is not None:
                    each.refresh(self.n_envs * self.settings.train_freq)
        self._n_updates = self.learner.updates
        self.seconds["update"] += time.perf_counter() - started
        return metrics

    def _batch(self, batch_size: int) -> Transitions:
        if self.demonstrated is None:
            return self.replay_buffer.sample(batch_size)
        shown = round(self.settings.demonstration_share * batch_size)
        if not shown:
            return self.replay_buffer.sample(batch_size)
        parts = self.replay_buffer.sample(batch_size - shown), self.demonstrated.sample(shown)
        return Transitions.joined(parts)

    def visited_observations(self) -> dict[str, torch.Tensor]:
        """Prepared observations of the replay, key -> ``(n, T_o, *shape)``."""
        return self.replay_buffer.sample(min(VISITED, self.replay_buffer.size())).observation

    def _write(self, path: str | Path | IO[bytes]) -> None:
        tensors, numbers = self.learner.state()
        replay = {f"replay.{name}": rows for name, rows in self.replay_buffer.state().items()}
        progress = OffPolicyProgress(**self.progress_numbers(), iteration=self.iterations, **numbers)
        model = SavedOffPolicy(
            self.flow_policy.config, self.algorithm, self.settings, self.sampling, self.seed,
            self.demonstrations is not None or self.lost_demonstrations, progress,
            {**tensors, **self.bounds(), **replay},
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
        saved = read_model(path)
        own = {
            "algorithm": saved.algorithm, "num_steps": saved.sampling.num_steps, "grid": saved.sampling.grid,
            "seed": saved.seed, **vars(saved.settings),
        }  # fmt: skip
        try:
            model = cls(FlowPolicy(saved.policy), env, device=device, **{**own, **replaced})
        except ConfigError as error:
            if replaced:
                raise
            raise CheckpointError(f"{path} does not describe an off-policy model: {error}") from error
        with taking_over(path):
            model._take_over(saved)
            model.flow_policy.check_normalizers(path)
        return model

    def _take_over(self, saved: SavedOffPolicy) -> None:
        progress = saved.progress
        place = ("chunks", progress.iteration)
        self.learner.load_state(saved.tensors, vars(progress), derived_seed(self.seed or 0, *place))
        self.iterations, self.lost_demonstrations = progress.iteration, saved.has_demonstrations
        self.go_on_from(progress, saved.tensors)
        replay = {
            name.removeprefix("replay."): rows
            for name, rows in saved.tensors.items()
            if name.startswith("replay.")
        }
        if replay:
            replay.setdefault("succeeded", torch.zeros_like(replay["is_last"]))  # which older files lack
            self.replay_buffer.put(Transitions.of(replay))

    def save_replay_buffer(self, path: Any) -> None:
        """Of stable-baselines3's interface, which would pickle.

        Raises:
            ConfigError: always; :meth:`save` holds the replay.
        """
        raise ConfigError("save() writes the replay with the model; leave out save_replay_buffer.")

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["actor_critic"], []


class _Steps:
    """Hands chunks on to a replay, and keeps what environments answered until the iteration is over."""

    def __init__(self, replay: ChunkReplay) -> None:
        self.replay, self.seen = replay, list[Any]()

    def add(self, observation: Any, decision: Any, step: Any, final_observation: Any, /) -> None:
        """See :class:`~flowpolicy.finetuning.collector.Buffer`."""
        self.replay.add(observation, decision, step, final_observation)
        self.seen.append(step)

    def arrays(self) -> tuple[Any, Any, Any]:
        """Rewards ``(S, N, T_e)``, steps executed and ends ``(S, N)``."""
        rewards = np.stack([step.rewards for step in self.seen]).astype(np.float64)
        ended = np.stack([step.terminated | step.truncated for step in self.seen])
        return rewards, np.stack([step.executed for step in self.seen]), ended
