"""Plans and cache schedules in files: out of range or elsewhere, they are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowpolicy import FlowPolicy, PolicyConfig
from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey, full_schedule
from flowpolicy.acceleration.choosing.plan import DeploymentPlan, MeasuredSampler, hardware
from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.runs.device import resolve_device


@pytest.fixture(scope="module")
def policy() -> FlowPolicy:
    torch.manual_seed(0)
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    return FlowPolicy(PolicyConfig({"name": "flow_matching"}, model, {"observation": (3,)}, 2, 1, 4, 4))


def plan_of(policy: FlowPolicy, **changes: Any) -> DeploymentPlan:
    sampling = SamplerSpec(num_steps=4, solver="euler", backend="eager")
    chosen = MeasuredSampler(sampling, 1.0, 4, {"p50": 1.0, "bound": 2.0}, 0.01)
    plan = DeploymentPlan(
        fingerprint(policy), hardware(1), 20.0, 0.99, 0.1, chosen, None, "cpu", 1, 4, {"return": 3.0}, "Why."
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


def refused(load: Any, path: Path, content: Any, dotted: str, value: Any) -> None:
    *groups, key = dotted.split(".")
    node = content
    for group in groups:
        node = node[int(group) if group.isdigit() else group]
    node[int(key) if key.isdigit() else key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("period_ms", float("nan")),
        ("period_ms", 0),
        ("period_ms", 1e308),
        ("quantile", 7),
        ("quantile", 0),
        ("max_action_error", -1),
        ("delay_ticks", -1),
        ("delay_ticks", 10**9),
        ("threads", 0),
        ("threads", 10**9),
        ("execute_horizon", 0),
        ("sampler.sampling.num_steps", 10**9),
        ("sampler.sampling.solver", "rk45"),
        ("sampler.sampling.solver", "elsewhere.json"),
        ("sampler.sampling.grid", {"name": "given", "times": [0, 0.9]}),
        ("sampler.sampling.backend", "cloud"),
        ("sampler.sampling.dtype", "float8"),
        ("sampler.sampling.schedule", "../../etc/passwd"),
        ("sampler.sampling.schedule", "/dev/zero"),
        ("sampler.sampling.schedule", ".."),
        ("sampler.share", 0),
        ("sampler.nfe", 0),
        ("sampler.latency_ms", {"p50": "fast"}),
        ("sampler.latency_ms", {"p50": -1}),
        ("sampler.latency_ms", None),
        ("sampler.action_error", -0.1),
        ("fast", {}),
        ("hardware", []),
        ("rollouts", 3),
        ("format_version", True),
        ("sampler.speed", 3),
    ],
)
def test_a_plan_out_of_range_is_refused(policy: FlowPolicy, tmp_path: Path, dotted: str, value: Any):
    path = plan_of(policy).save(tmp_path / "plan.json")
    DeploymentPlan.load(path).check(policy)
    refused(DeploymentPlan.load, path, json.loads(path.read_text()), dotted, value)


def test_a_plan_of_a_longer_chunk_is_refused(policy: FlowPolicy):
    with pytest.raises(CheckpointError, match="executes 5 actions of a chunk of 4"):
        plan_of(policy, execute_horizon=5).check(policy)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("key.num_steps", 10**9),
        ("key.num_steps", 0),
        ("key.num_evaluations", 3),
        ("key.num_evaluations", 10**9),
        ("key.grid", {"name": "even"}),
        ("key.chunk_shape", [0, 2]),
        ("key.chunk_shape", [4]),
        ("key.blocks", []),
        ("key.blocks.0", 3),
        ("updates", []),
        ("updates.0", [1, 2]),
        ("updates.0", [0, 2, 2]),
        ("updates.0", [0, 10**9]),
        ("updates.0", [0, "1"]),
        ("updates.0", [0, 1.0]),
        ("updates.0", [False, 1]),
        ("updates", {"0": [0]}),
        ("method", 3),
        ("key", None),
    ],
)
def test_a_schedule_out_of_range_is_refused(policy: FlowPolicy, tmp_path: Path, dotted: str, value: Any):
    path = full_schedule(ScheduleKey.of(policy, SamplerSpec(num_steps=4))).save(tmp_path / "schedule.json")
    assert Schedule.load(path) == full_schedule(ScheduleKey.of(policy, SamplerSpec(num_steps=4)))
    refused(Schedule.load, path, json.loads(path.read_text()), dotted, value)


def test_a_schedule_of_format_1_had_the_level_of_its_step_size(policy: FlowPolicy, tmp_path: Path):
    schedule = full_schedule(ScheduleKey.of(policy, SamplerSpec(num_steps=4)))
    path = schedule.save(tmp_path / "schedule.json")
    content = json.loads(path.read_text())
    del content["key"]["grid"]
    content["key"]["level"] = 0
    path.write_text(json.dumps({**content, "format_version": 1}))
    assert Schedule.load(path) == schedule
    Schedule.load(path).check(policy, SamplerSpec(num_steps=4))


def test_threads_and_devices_are_those_of_machines():
    with pytest.raises(ConfigError, match="threads"):
        DeployedSampler(checkpoint="a", threads=10**9)
    with pytest.raises(ConfigError, match="device=meta"):
        resolve_device("meta")
