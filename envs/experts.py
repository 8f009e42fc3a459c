"""Train an expert with stable-baselines3: resumable, with an actor file at every checkpoint."""

from __future__ import annotations

import csv
import functools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import make_environment
from flowpolicy.files.storage import atomic_file
from flowpolicy.ranges import PositiveInt
from flowpolicy.runs.progress import ProgressBar
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import Settings, choose
from flowpolicy_envs.actor import ActorInfo, actor_from_sb3
from flowpolicy_envs.rollouts import episode_returns

logger = logging.getLogger(__name__)
ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "sac": SAC}


@dataclass(frozen=True)
class ExpertConfig(Settings, prefix="env.expert"):
    """How a task's expert is trained.

    Attributes:
        algorithm: ``ppo`` or ``sac``.
        total_steps: environment steps in all.
        num_envs: environments stepped side by side.
        checkpoint_every: environment steps between checkpoints; each leaves an actor file and its return.
        eval_episodes: episodes, with stochastic actions, behind each checkpoint's return.
        normalize: running normalisation of observations and rewards (PPO wants it).
        settings: keyword arguments of the stable-baselines3 class.
    """

    algorithm: str = "ppo"
    total_steps: PositiveInt = 1_000_000
    num_envs: PositiveInt = 4
    checkpoint_every: PositiveInt = 50_000
    eval_episodes: PositiveInt = 10
    normalize: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(ALGORITHMS, self.algorithm, "env.expert.algorithm")


class _Checkpoints(BaseCallback):
    """Saves model, normaliser, replay buffer and actor file every ``checkpoint_every`` steps."""

    def __init__(
        self,
        run_dir: Path,
        env_id: str,
        config: ExpertConfig,
        seed: int,
        info: dict[str, Any],
        env_kwargs: dict[str, Any],
    ) -> None:
        super().__init__()
        self.run_dir, self.env_id, self.config, self.seed, self.info = run_dir, env_id, config, seed, info
        self.env_kwargs = env_kwargs
        self._next = config.checkpoint_every

    bar: ProgressBar

    def _on_training_start(self) -> None:
        every = self.config.checkpoint_every
        self._next = (self.num_timesteps // every + 1) * every

    def _on_step(self) -> bool:
        self.bar.update(self.training_env.num_envs)
        if self.num_timesteps >= self._next:
            self._next += self.config.checkpoint_every
            self.save()
        return True

    def save(self) -> None:
        """Write everything a resumed run needs; each file is replaced as a whole."""
        normalizer = self.model.get_vec_normalize_env()
        rms = normalizer.obs_rms if normalizer is not None else None
        steps = self.num_timesteps
        blank = ActorInfo(self.env_id, self.config.algorithm, steps, self.seed, 0.0, 0.0, **self.info)
        actor = actor_from_sb3(self.model, rms, blank)
        returns = episode_returns(
            actor,
            self.env_id,
            self.config.eval_episodes,
            seed=derived_seed(self.seed, "evaluation"),
            env_kwargs=self.env_kwargs,
        )
        actor.info = ActorInfo(
            **{**blank.__dict__, "return_mean": float(returns.mean()), "return_std": float(returns.std())}
        )
        actor.save(self.run_dir / "actors" / f"step_{steps:08d}.safetensors")
        self._replace("model.zip", self.model.save)
        if normalizer is not None:
            self._replace("normalizer.pkl", normalizer.save)
        if hasattr(self.model, "save_replay_buffer"):
            self._replace("replay_buffer.pkl", self.model.save_replay_buffer)
        row = {"steps": steps, "return_mean": returns.mean().round(1), "return_std": returns.std().round(1)}
        self._append(row)
        logger.info("%s steps: return %.0f +- %.0f", f"{steps:,}", returns.mean(), returns.std())

    def _append(self, row: dict[str, Any]) -> None:
        """Add a row to checkpoints.csv, in the place of an earlier one of the same step."""
        path = self.run_dir / "checkpoints.csv"
        rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [old for old in csv.DictReader(file) if int(old["steps"]) != row["steps"]]
        with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows([*rows, row])

    def _replace(self, name: str, save: Any) -> None:
        temporary = self.run_dir / f"tmp_{name}"
        save(str(temporary))
        temporary.replace(self.run_dir / name)


def _with_activation(settings: dict[str, Any]) -> dict[str, Any]:
    """YAML names an activation by its torch class (``ReLU``); stable-baselines3 wants the class itself."""
    kwargs = dict(settings.get("policy_kwargs", {}))
    if "activation_fn" in kwargs:
        activation = getattr(torch.nn, kwargs["activation_fn"], None)
        if activation not in (torch.nn.ReLU, torch.nn.Tanh):
            raise ConfigError(
                f"env.expert.settings.policy_kwargs.activation_fn is {kwargs['activation_fn']!r}; "
                "use ReLU or Tanh."
            )
        kwargs["activation_fn"] = activation
    return {**settings, "policy_kwargs": kwargs}


def train_expert(
    env_id: str,
    config: ExpertConfig,
    run_dir: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    progress_bar: bool = True,
    command: str = "",
    versions: dict[str, str] | None = None,
    env_kwargs: dict[str, Any] | None = None,
) -> Path:
    """Train an expert; returns the folder of its actor files.

    With ``resume`` the run continues from its last checkpoint (the one optimiser, the replay buffer
    and the normaliser included); its environments start new episodes. The checkpoints are this run's own
    files: stable-baselines3 pickles them, so resume only what you have trained yourself.

    Raises:
        ConfigError: a folder that holds another run, without ``resume``, or refused settings.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    saved = run_dir / "model.zip"
    if saved.exists() and not resume:
        raise ConfigError(
            f"{run_dir} holds an expert's training already; add resume=true or choose another run_dir."
        )
    make = functools.partial(make_environment, env_id, env_kwargs or {}, "An expert's training")
    envs: VecEnv = make_vec_env(make, n_envs=config.num_envs, seed=derived_seed(seed, "environments"))
    algorithm = ALGORITHMS[config.algorithm]
    if resume and saved.exists():
        if config.normalize:
            envs = VecNormalize.load(str(run_dir / "normalizer.pkl"), envs)
        model = algorithm.load(str(saved), env=envs, device="cpu")
        if isinstance(model, SAC):
            model.load_replay_buffer(str(run_dir / "replay_buffer.pkl"))
    else:
        if config.normalize:
            gamma = float(config.settings.get("gamma", 0.99))
            envs = VecNormalize(envs, gamma=gamma)
        try:
            model = algorithm("MlpPolicy", envs, seed=seed, device="cpu", **_with_activation(config.settings))
        except TypeError as error:
            raise ConfigError(
                f"env.expert.settings: {error}; see stable-baselines3's {algorithm.__name__}."
            ) from error
    info = {"command": command, "versions": versions or {}}
    checkpoints = _Checkpoints(run_dir, env_id, config, seed, info, dict(env_kwargs or {}))
    remaining = config.total_steps - model.num_timesteps
    if remaining > 0:
        done = model.num_timesteps
        with ProgressBar(
            config.total_steps, "train expert", done=done, silent=progress_bar
        ) as checkpoints.bar:
            model.learn(remaining, callback=checkpoints, reset_num_timesteps=False, progress_bar=progress_bar)
        checkpoints.save()
    return run_dir / "actors"
