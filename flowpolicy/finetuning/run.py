"""A run of ReinFlow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import Task
from flowpolicy.finetuning.advantage_registry import build_advantages
from flowpolicy.finetuning.chain import NoisyFlow, chain_steps
from flowpolicy.finetuning.config import FinetuneConfig
from flowpolicy.finetuning.online_run import Recipe, run_online
from flowpolicy.finetuning.regularization import BehaviourCloning, Regularizer, Wasserstein
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.rules import build_update_rule
from flowpolicy.policy import FlowPolicy
from flowpolicy.pretraining.config import DataConfig
from flowpolicy.pretraining.stores import make_samplers
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.run_folder import FINETUNING
from flowpolicy.settings import build


def finetune(settings: Mapping[str, Any], run_dir: Path, *, command: str = "") -> Path | None:
    """Run; see :func:`~flowpolicy.finetuning.online_run.run_online`."""
    return run_online(build(FinetuneConfig, settings, ""), ReinFlowRecipe, run_dir, command)


class ReinFlowRecipe(Recipe):
    """ReinFlow with an update rule and regularisers."""

    kind = FINETUNING
    algorithm = "reinflow"
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, base: FlowPolicy, group: Processes) -> None:
        super().__init__(config, base, group)
        self.update, self.regularizers = build_update_rule(config.update), _regularizers(config, base)
        self.advantages = None
        if config.advantages is not None:
            discounts = {"gamma": config.reinflow.gamma, "gae_lambda": config.reinflow.gae_lambda}
            self.advantages = build_advantages(config.advantages, **discounts)
        self.named = {"update": self.update, "advantages": self.advantages}

    def new(self, policy: FlowPolicy, env: VecEnv, task: Task) -> ReinFlow:
        """See :class:`Recipe`."""
        config, settings = self.config, dict[str, Any](vars(self.config.reinflow))
        share = settings.pop("final_learning_rate")
        if share < 1:
            settings["learning_rate"] = LinearSchedule(
                settings["learning_rate"], settings["learning_rate"] * share, 1.0
            )
        return ReinFlow(
            policy, env, num_steps=config.num_steps, grid=config.grid, noise=config.noise,
            update=self.update, advantages=self.advantages, regularizers=self.regularizers,
            execute_horizon=task.execute_horizon, processes=self.group, reference=self.base, seed=config.seed,
            device=self.base.device, **settings,
        )  # fmt: skip

    def load(self, path: Path, env: VecEnv | None) -> ReinFlow:
        """See :class:`Recipe`."""
        return ReinFlow.load(
            path, env, self.base.device, processes=self.group, regularizers=self.regularizers,
            reference=self.base,
        )  # fmt: skip


def _regularizers(config: FinetuneConfig, base: FlowPolicy) -> tuple[Regularizer, ...]:
    wanted, terms = config.regularization, list[Regularizer]()
    if wanted.wasserstein:
        steps = chain_steps(base, config.num_steps)
        reference = NoisyFlow(base, steps, config.noise, config.grid).frozen_copy().to(base.device)
        terms.append(Wasserstein(reference, wanted.wasserstein))
    if wanted.behaviour_cloning:
        store = wanted.demonstrations or config.env.get("demonstrations")
        if not store:
            raise ConfigError(
                "regularization.behaviour_cloning needs demonstrations; add "
                "regularization.demonstrations=STORE."
            )
        data = DataConfig(observation_keys=tuple(base.spec.observation_shapes), validation_fraction=0.0)
        kinds = {key: feature.declaration() for key, feature in base.spec.features.items()}
        demos = read_demonstrations(store, data.observation_keys, kinds=kinds)
        training, _ = make_samplers(base, demos, data, config.seed)
        terms.append(BehaviourCloning(base.objective, training, wanted.behaviour_cloning))
    return tuple(terms)
