"""Settings of fine-tuning on a robot."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from flowpolicy.acceleration.choosing.plan import DeployConfig
from flowpolicy.control.run_config import RunConfig
from flowpolicy.finetuning.offpolicy.config import OffPolicySettings
from flowpolicy.ranges import PositiveFloat, PositiveInt
from flowpolicy.settings import require


@dataclass(frozen=True, kw_only=True)
class RobotFinetuningConfig(RunConfig):
    """Settings of `scripts/finetune_robot.py`: those of a control run, and these.

    Attributes:
        algorithm: the off-policy algorithm's ``name`` and its settings.
        offpolicy: what all algorithms share.
        demonstrations: store with rewards, for a share of each batch; None: none.
        reward: ``robot``, what the robot tells; ``success``, 1 at the end of an episode that the operator or
            the robot calls a success; or ``module:function``, as
            :mod:`flowpolicy.control.finetuning.rewards` says.
        publish_every_s: seconds between two versions of the policy.
        save_every_s: seconds between two saved states.
        learner_threads: CPU threads of the learner.
        resume: go on with the run in the run's folder.
    """

    algorithm: dict[str, Any] = field(default_factory=dict)
    offpolicy: OffPolicySettings = field(default_factory=OffPolicySettings)
    demonstrations: str | None = None
    reward: str = "robot"
    publish_every_s: PositiveFloat = 5.0
    save_every_s: PositiveFloat = 30.0
    learner_threads: PositiveInt = 1
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("policy_server", "fast_steps", "plan", "schedule", "solver", "guidance"):
            value = getattr(self, name)
            require(value is None, name, value, "left out: a policy that learns is sampled as it learns")
        require(not self.dry_run, "dry_run", self.dry_run, "false: there is nothing to learn from")
        require(self.control.fusion != "rtc", "control.fusion", self.control.fusion, "switch or ensemble")
        for name in ("backend", "dtype"):
            value, own = getattr(self, name), _DEFAULTS[name]
            is_plain = value == own or value == "eager"
            require(is_plain, name, value, f"{own}: a policy that learns is sampled in eager PyTorch")

    def learning(self) -> dict[str, Any]:
        """What a resumed run must have in common with the first one."""
        settings = dataclasses.asdict(self)
        names = ("algorithm", "offpolicy", "demonstrations", "reward", "num_steps", "grid")
        horizon = {"execute_horizon": self.control.execute_horizon}
        return {**{name: settings[name] for name in names}, "control": horizon}


_DEFAULTS = {item.name: item.default for item in dataclasses.fields(DeployConfig)}
