"""Settings of a control run, and the policy and samplers that they ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from flowpolicy.acceleration.choosing.plan import DeployConfig, DeploymentPlan
from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.inference import SPARES
from flowpolicy.control.policy_source import LoadedPolicy, PolicyOfServer, PolicySource
from flowpolicy.control.robots.choosing import RobotConfig
from flowpolicy.control.served import Connect, PolicyServer
from flowpolicy.errors import ConfigError
from flowpolicy.flow.guidance import build_guidance
from flowpolicy.policy import FlowPolicy
from flowpolicy.ranges import NonNegativeInt, PositiveFloat, at_least


@dataclass(frozen=True, kw_only=True)
class RunConfig(DeployConfig):
    """Settings of `scripts/run_control.py`: the sampler's, and these.

    Attributes:
        robot: that it controls.
        task: what to do, in words, for a policy that reads them.
        control: settings of the loop; a plan's T_e takes the place of an ``execute_horizon`` of None.
        fast_steps: K of the faster sampler that fills gaps; None has none, or the plan's.
        inference: ``process`` or ``thread``, where chunks are sampled.
        spares: samplers kept ready to replace the active one if it fails; each takes
            the memory of one more policy.
        duration_s: of the run.
        seed: of the noises.
        video: seconds of video of a simulated robot, recorded afterwards; true: 30 of them, false: none.
        rerun: also write the telemetry for the Rerun viewer.
        record: new store that the episodes are kept in as demonstrations; None keeps none.
        operator: who may take command: ``keyboard``, ``gamepad``, ``lerobot``, ``module:function``, or
            ``{kind: name, ...}`` with settings of it; None: nobody.
        policy_server: a server of the policy, or its address alone, in place of ``checkpoint``.
        dry_run: nothing is sent to the robot; what would have been is kept and shown.
        checklist: what is checked before the first motion; false leaves out what is not safety. Simulations
            and recordings have none.
    """

    checkpoint: str = ""
    robot: RobotConfig = field(default_factory=RobotConfig)
    task: str | None = None
    control: ControlConfig = field(default_factory=ControlConfig)
    fast_steps: int | None = None
    inference: str = "process"
    spares: NonNegativeInt = SPARES
    duration_s: PositiveFloat = 30.0
    seed: int = 0
    video: Annotated[bool | float, at_least(0, "0 or more seconds, true or false")] = True
    rerun: bool = False
    record: str | None = None
    operator: str | dict[str, Any] | None = None
    policy_server: str | PolicyServer | None = None
    dry_run: bool = False
    checklist: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.policy_server, str):
            object.__setattr__(self, "policy_server", PolicyServer(self.policy_server))
        if bool(self.checkpoint) == bool(self.policy_server):
            raise ConfigError(
                "checkpoint and policy_server are both given; leave out one of them."
                if self.checkpoint
                else "'checkpoint' needs a value; add checkpoint=PATH, or policy_server=ws://HOST:PORT."
            )
        if self.policy_server is not None:
            self._check_served()
        if self.dry_run and self.record is not None:
            raise ConfigError("Nothing happens in a dry_run that could be recorded; leave out record=.")
        if self.plan and self.fast_steps is not None:
            raise ConfigError("plan= decides fast_steps too; leave out one of them.")
        if self.inpainting:
            plain = self.plan is None and self.schedule is None and self.dtype == "float32"
            if not plain or self.backend not in ("auto", "eager"):
                raise ConfigError(
                    "control.fusion=rtc samples its chunks in eager PyTorch; leave out plan=, schedule=, "
                    "dtype= and backend=, and name num_steps= where the policy's own is not wanted."
                )
            guidance = build_guidance(self.guidance)
            if guidance is not None and "prefix" not in guidance.options:
                raise ConfigError(
                    f"control.fusion=rtc gives its guidance a prefix, which '{guidance.name}' does not take; "
                    "leave out guidance=."
                )

    def _check_served(self) -> None:
        default = DeployConfig(checkpoint="")
        ours = [item.name for item in dataclasses.fields(DeployConfig)]
        changed = [name for name in ours if getattr(self, name) != getattr(default, name)]
        changed += ["fast_steps"] if self.fast_steps is not None else []
        changed += ["control.fusion=rtc"] if self.inpainting else []
        if changed:
            raise ConfigError(
                f"The policy's server decides how it is sampled; leave out {', '.join(changed)}."
            )

    @property
    def inpainting(self) -> bool:
        """Whether chunks must agree with a prefix."""
        return self.control.fusion == "rtc"

    def source(self, connect: Connect | None) -> PolicySource:
        """The policy, loaded or reached.

        Raises:
            FlowPolicyError: checkpoint, plan, settings or server are not usable.
        """
        if isinstance(self.policy_server, PolicyServer):
            if connect is None:
                raise ConfigError(
                    "policy_server needs run_control(..., connect=RemotePolicy), which "
                    "flowpolicy.serving.remote has."
                )
            return PolicyOfServer(self.policy_server.url, connect(self.policy_server))
        policy = FlowPolicy.load(self.checkpoint)
        plan = self.read_plan(policy)
        sampler, faster = self.samplers(policy, plan)
        return LoadedPolicy(self.checkpoint, policy, plan, self.plan, sampler, faster, self.seed)

    def samplers(
        self, policy: FlowPolicy, plan: DeploymentPlan | None
    ) -> tuple[DeployedSampler, DeployedSampler | None]:
        """Settings of the sampler and of the faster one."""
        if plan is not None:
            return plan.deployed(self.checkpoint), plan.deployed_fast(self.checkpoint)
        given = self.deployed()
        if self.inpainting:
            # The published guidance hardly moves a policy that is sure of what it does (docs/deploy.md).
            steps = policy.checked(given).steps
            guidance = {"name": "prefix", "beta": 4.0 * steps, "prior_std": 0.2}
            given = replace(given, backend="eager", guidance=given.guidance or guidance)
        if self.fast_steps is None:
            return given, None
        faster = replace(given, num_steps=self.fast_steps, solver=None, schedule=None, guidance=None)
        policy.checked(faster)
        return given, replace(faster, backend=self.backend)
