"""A run of off-policy fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from flowpolicy.data.store import Demonstrations, read_demonstrations
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import Task
from flowpolicy.finetuning.offpolicy.algorithms import build_algorithm
from flowpolicy.finetuning.offpolicy.config import OffPolicyConfig
from flowpolicy.finetuning.offpolicy.off_policy import OffPolicy
from flowpolicy.finetuning.online_run import Recipe, run_online
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.run_folder import OFFPOLICY
from flowpolicy.settings import build


def finetune_offpolicy(settings: Mapping[str, Any], run_dir: Path, *, command: str = "") -> Path | None:
    """Run; see :func:`~flowpolicy.finetuning.online_run.run_online`."""
    return run_online(build(OffPolicyConfig, settings, ""), OffPolicyRecipe, run_dir, command)


class OffPolicyRecipe(Recipe):
    """An off-policy algorithm, and the task's demonstrations."""

    kind = OFFPOLICY
    config: OffPolicyConfig

    def __init__(self, config: OffPolicyConfig, base: FlowPolicy, group: Processes) -> None:
        super().__init__(config, base, group)
        if group.count > 1:
            raise ConfigError("Off-policy fine-tuning runs in one process; start it without torchrun.")
        base.require_unsteered("Off-policy fine-tuning")
        self.learns = build_algorithm(config.algorithm)
        self.named = {"algorithm": self.learns}
        self.demonstrations = self._demonstrations()

    @property
    def algorithm(self) -> str:
        """Its name."""
        return self.learns.name

    def new(self, policy: FlowPolicy, env: VecEnv, task: Task) -> OffPolicy:
        """See :class:`Recipe`."""
        config = self.config
        return OffPolicy(
            policy, env, algorithm=self.learns, demonstrations=self.demonstrations,
            num_steps=config.num_steps, grid=config.grid, execute_horizon=task.execute_horizon,
            seed=config.seed, device=self.base.device, **vars(config.offpolicy),
        )  # fmt: skip

    def load(self, path: Path, env: VecEnv | None) -> OffPolicy:
        """See :class:`Recipe`."""
        return OffPolicy.load(path, env, self.base.device, demonstrations=self.demonstrations)

    def _demonstrations(self) -> Demonstrations | None:
        store = self.config.demonstrations or self.config.env.get("demonstrations")
        if not store or not self.config.offpolicy.demonstration_share:
            return None
        kinds = {key: feature.declaration() for key, feature in self.base.spec.features.items()}
        return read_demonstrations(store, tuple(self.base.spec.observation_shapes), kinds=kinds)
