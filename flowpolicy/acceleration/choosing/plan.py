"""A deployment plan: which sampler keeps a deadline on which machine; loop and server load the file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from flowpolicy.acceleration.deployed import MOST_THREADS, DeployedSampler, only
from flowpolicy.acceleration.sampler import BACKENDS
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.evaluation.summary import machine
from flowpolicy.files.reading import read_versioned
from flowpolicy.files.storage import write_json
from flowpolicy.flow.sampler_spec import MOST_STEPS, SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import LONGEST
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.ranges import NonNegativeFloat, between, positive_to, within
from flowpolicy.settings import Settings, build, require

FORMAT_VERSION = 2


@dataclass(frozen=True)
class MeasuredSampler(Settings, prefix="plan.sampler"):
    """One way of sampling, with what was measured of it.

    Attributes:
        sampling: K, solver, grid, backend and dtype; its ``schedule`` is the name of a file beside the plan.
        share: f, blocks recomputed.
        nfe: network evaluations.
        latency_ms: p50, p95, p99, p99.9, max, and ``bound``: what the stated quantile is below, at 95%
            confidence and in the worst of several bouts.
        action_error: rms to the policy's best sampling with the same noise, normalised units.
        action_error_bound: what it is below on other observations, at 95% confidence.
        largest_action_error: of any action measured.
    """

    sampling: SamplerSpec
    share: Annotated[float, within("(0, 1]")]
    nfe: Annotated[int, between(1, 4 * MOST_STEPS)]
    latency_ms: dict[str, float]
    action_error: NonNegativeFloat
    action_error_bound: NonNegativeFloat | None = None
    largest_action_error: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, solver, backend = self.sampling.num_steps, self.sampling.solver, self.sampling.backend
        require(steps is not None, "plan.sampler.num_steps", steps, f"between 1 and {MOST_STEPS}")
        is_named = solver is not None and self.sampling.solver_file is None
        require(is_named, "plan.sampler.solver", solver, "the name of a solver")
        require(backend in BACKENDS, "plan.sampler.backend", backend, f"one of {', '.join(BACKENDS)}")
        file = self.sampling.schedule
        is_beside = file is None or (Path(file).name == file and file not in ("", ".", ".."))
        require(is_beside, "plan.sampler.schedule", file, "the name of a file beside the plan")
        for key, latency in self.latency_ms.items():
            require(latency >= 0, f"plan.sampler.latency_ms.{key}", latency, "0 or more")


@dataclass(frozen=True)
class DeploymentPlan(Settings, prefix="plan"):
    """The choice of `scripts/plan.py`.

    Attributes:
        fingerprint: of the policy's weights and normalisers.
        hardware: what latencies depend on; see :func:`hardware`.
        period_ms: within which a call must end.
        quantile: share of the calls that must.
        max_action_error: bound of ``action_error_bound``.
        sampler: the chosen one.
        fast: a faster one for gaps, or None.
        device: of the policy.
        threads: CPU threads.
        execute_horizon: T_e it was validated with.
        rollouts: metric of the task with injected latency, its interval and the number of episodes.
        reason: why this one, in words.
        delay_ticks: control steps of the task within which the stated share of the chunks come.
        folder: of the file; schedules lie there.
    """

    fingerprint: str
    hardware: dict[str, Any]
    period_ms: Annotated[float, positive_to(1e6)]
    quantile: Annotated[float, within("(0, 1]")]
    max_action_error: NonNegativeFloat
    sampler: MeasuredSampler
    fast: MeasuredSampler | None
    device: str
    threads: Annotated[int, between(1, MOST_THREADS)]
    execute_horizon: Annotated[int, between(1, LONGEST)]
    rollouts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    delay_ticks: Annotated[int, between(0, LONGEST)] = 0
    folder: str = ""

    def check(self, policy: FlowPolicy) -> None:
        """Refuse another checkpoint or another machine.

        Raises:
            CheckpointError: names what differs.
        """
        if self.fingerprint != fingerprint(policy):
            raise CheckpointError("The plan was made for another checkpoint; make one with flowpolicy plan.")
        if self.execute_horizon > policy.spec.action_horizon:
            raise CheckpointError(
                f"The plan executes {self.execute_horizon} actions of a chunk of "
                f"{policy.spec.action_horizon}; make one with flowpolicy plan."
            )
        here = hardware(self.threads)
        for name in sorted(here.keys() | self.hardware.keys()):
            if here.get(name) != self.hardware.get(name):
                there = " ".join(str(self.hardware.get(name)).split())[:80]
                raise CheckpointError(
                    f"The plan was made on another machine ({name[:80]}: {there} there, "
                    f"{here.get(name)} here); measure this one with flowpolicy plan."
                )

    def deployed(self, checkpoint: str) -> DeployedSampler:
        """The chosen sampler."""
        return self._deployed(self.sampler, checkpoint)

    def deployed_fast(self, checkpoint: str) -> DeployedSampler | None:
        """The faster one."""
        return None if self.fast is None else self._deployed(self.fast, checkpoint)

    def _deployed(self, chosen: MeasuredSampler, checkpoint: str) -> DeployedSampler:
        content = chosen.sampling.content()
        if chosen.sampling.schedule is not None:
            content["schedule"] = str(Path(self.folder) / chosen.sampling.schedule)
        return DeployedSampler(checkpoint=checkpoint, device=self.device, threads=self.threads, **content)

    def save(self, path: Path) -> Path:
        """Write it as JSON, all or nothing."""
        content = dataclasses.asdict(self)
        del content["folder"]
        write_json(path, {"format_version": FORMAT_VERSION, **content})
        return path

    @classmethod
    def load(cls, path: Path | str) -> DeploymentPlan:
        """Read a plan.

        Raises:
            CheckpointError: no such file, or no plan in it.
        """
        content = read_versioned(path, "plan", FORMAT_VERSION, "make one with flowpolicy plan")
        for name in ("sampler", "fast"):
            if name in content:
                content[name] = _of_format_1(content[name])
        try:
            return build(cls, {**content, "folder": str(Path(path).parent)}, "plan")
        except ConfigError as error:
            raise CheckpointError(f"{path} is not a plan: {error}") from error


def _of_format_1(content: Any) -> Any:
    """A sampler as it is written now, where format 1 had its way of sampling among the figures."""
    if not isinstance(content, dict) or "sampling" in content:
        return content
    names = ("num_steps", "solver", "backend", "schedule", "dtype")
    sampling = {name: content[name] for name in names if content.get(name) is not None}
    return {"sampling": sampling, **{name: value for name, value in content.items() if name not in names}}


@dataclass(frozen=True, kw_only=True)
class DeployConfig(DeployedSampler):
    """A sampler, or a plan that chooses it: what the settings of loop and server have in common.

    Attributes:
        plan: a file of `scripts/plan.py`; it decides everything else but the checkpoint.
    """

    plan: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        default = DeployedSampler(checkpoint=self.checkpoint)
        for item in dataclasses.fields(DeployedSampler):
            if self.plan and getattr(self, item.name) != getattr(default, item.name):
                raise ConfigError(f"plan= decides {item.name} too; leave out one of them.")

    def deployed(self) -> DeployedSampler:
        """The sampler alone, without a plan."""
        return only(self, DeployedSampler)

    def read_plan(self, policy: FlowPolicy) -> DeploymentPlan | None:
        """The plan, if there is one.

        Raises:
            CheckpointError: there is no plan in the file, or one for another checkpoint or machine.
        """
        if self.plan is None:
            return None
        plan = DeploymentPlan.load(self.plan)
        plan.check(policy)
        return plan


def hardware(threads: int) -> dict[str, Any]:
    """What latencies depend on: processor, cores, threads, GPU, system, and versions of what computes."""
    found = {key: value for key, value in machine().items() if key != "threads"}
    found["threads"] = threads
    for package in ("torch", "onnxruntime"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
