"""A checkpoint chooses only among environments known here; no module and no file is opened on its word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flowpolicy import FlowPolicy, PolicyConfig
from flowpolicy.errors import ConfigError, FlowPolicyError, TaskError
from flowpolicy.evaluation.sweep import EvaluationConfig, evaluate_sweep
from flowpolicy.evaluation.task import task_of
from flowpolicy.models.config import TransformerConfig

HOPPER = {"name": "hopper", "env_id": "Hopper-v5"}
PEN = {"name": "pen", "env_id": "flowpolicy_envs:flowpolicy/AdroitPen-v1"}


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module on the path that must not be imported."""
    (tmp_path / "a_trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "a_trap"


def checkpoint(folder: Path, task: dict[str, Any]) -> str:
    torch.manual_seed(0)
    config = PolicyConfig(
        objective={"name": "flow_matching"}, model=TransformerConfig(width=16, depth=1, num_heads=2),
        observations={"observation": (11,)}, action_dim=3, obs_horizon=1, action_horizon=4,
        execute_horizon=4, task=task,
    )  # fmt: skip
    return str(FlowPolicy(config).save(folder))


def _evaluate(path: str, run_dir: Path) -> None:
    evaluate_sweep(EvaluationConfig(path, episodes=1), run_dir)


def _calibrate(path: str, run_dir: Path) -> None:
    from flowpolicy.acceleration.caching.calibration import CalibrationConfig, calibrate_checkpoint

    calibrate_checkpoint(CalibrationConfig(path), None)


def _time(path: str, run_dir: Path) -> None:
    from flowpolicy.acceleration.latency import LatencyConfig, benchmark_checkpoint

    benchmark_checkpoint(LatencyConfig(path), None)


def _plan(path: str, run_dir: Path) -> None:
    from flowpolicy.acceleration.choosing.choose import plan_checkpoint
    from flowpolicy.acceleration.choosing.config import PlanConfig

    plan_checkpoint(PlanConfig(path, period_ms=20.0), None)


def _drive(path: str, run_dir: Path) -> None:
    from flowpolicy.control.run import run_control
    from flowpolicy.control.run_config import RunConfig

    run_control(RunConfig(checkpoint=path), run_dir, "")


@pytest.mark.parametrize("use", [_evaluate, _calibrate, _time, _plan, _drive])
def test_no_command_imports_what_a_checkpoint_names(use: Any, trap: str, tmp_path: Path):
    path = checkpoint(tmp_path / "checkpoint", {**HOPPER, "env_id": f"{trap}:Hopper-v5"})
    with pytest.raises(TaskError, match="env=NAME") as refused:
        use(path, tmp_path)
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)
    assert trap not in sys.modules


@pytest.mark.parametrize(
    "task",
    [
        {**HOPPER, "env_id": "os.path:Hopper-v5:x"},
        {**HOPPER, "env_id": "webbrowser:Nothing-v0"},
        {**HOPPER, "env_id": "../../Hopper-v5"},
        {**PEN, "env_kwargs": {"wrapped_id": "a_trap:AdroitHandPen-v1"}},
        {"name": "old", "env_id": "GymV21Environment-v0", "env_kwargs": {"env_id": "a_trap:X-v0"}},
        {**HOPPER, "env_kwargs": {"xml_file": "/etc/passwd"}},
        {**HOPPER, "env_kwargs": {"xml_file": "../../secret.xml"}},
        {**HOPPER, "env_kwargs": {"xml_file": ".hidden"}},
        {**HOPPER, "env_kwargs": {"xml_file": "~/secret.xml"}},
        {**HOPPER, "env_kwargs": {"nested": {"list": [["a", {"b": "C:\\x"}]]}}},
        {**HOPPER, "env_kwargs": {"nested": {"a/b": 1}}},
        {**HOPPER, "env_kwargs": {"frame_skip": 10**9}},
        {**HOPPER, "env_kwargs": {"healthy_reward": float("nan")}},
        {**HOPPER, "env_kwargs": {"render_mode": "human"}},
        {**HOPPER, "env_kwargs": {"xml_file": "x" * 1000}},
    ],
    ids=lambda task: str(task.get("env_kwargs") or task["env_id"])[:40],
)
def test_paths_modules_and_windows_are_refused(task: dict[str, Any], trap: str):
    with pytest.raises(FlowPolicyError, match="env=") as refused:
        task_of(task, None, "a/checkpoint")
    assert str(refused.value).startswith("a/checkpoint ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert trap not in sys.modules
    given = {**task, "env_kwargs": {}, "env_id": "Hopper-v5"}
    assert task_of(task, given, "a/checkpoint").env_id == "Hopper-v5"  # a user's word stands in its place


@pytest.mark.parametrize("env_kwargs", [{"wrapped_id": "a_trap:AdroitHandPen-v1"}, {"xml_file": "/x.xml"}])
def test_a_user_may_name_anything(env_kwargs: dict[str, Any]):
    task = {**HOPPER, "env_id": "my_package:Mine-v0", "env_kwargs": env_kwargs}
    assert task_of({}, task, "a/checkpoint").env_kwargs == env_kwargs


def test_a_user_changes_a_part_of_the_task_that_a_checkpoint_names(trap: str):
    task = {**HOPPER, "env_kwargs": {"healthy_reward": 0.5, "frame_skip": 2}}
    given = {"env_kwargs": {"frame_skip": 5, "xml_file": "/x.xml"}, "instruction": "hop"}
    found = task_of(task, given, "a/checkpoint")
    assert found.env_kwargs == {"healthy_reward": 0.5, "frame_skip": 5, "xml_file": "/x.xml"}
    assert (found.env_id, found.instruction) == (task["env_id"], "hop")
    with pytest.raises(TaskError, match="env=NAME"):  # the checkpoint's own part is still a stranger's
        task_of({**HOPPER, "env_id": f"{trap}:Hopper-v5"}, given, "a/checkpoint")
    with pytest.raises(ConfigError, match="name one, e"):
        task_of({}, given, "a/checkpoint")
    with pytest.raises(ConfigError, match=r"env\.env_kwargs"):
        task_of(task, {"env_kwargs": 1}, "a/checkpoint")


def test_what_the_package_ships_is_allowed(repo_root: Path):
    omegaconf = pytest.importorskip("omegaconf")
    found = []
    for file in sorted((repo_root / "configs" / "env").glob("*.yaml")):
        content = omegaconf.OmegaConf.load(file)
        if "env_id" in content:  # others build on these
            content.name = file.stem
            found.append(task_of(omegaconf.OmegaConf.to_container(content, resolve=True), None, "x").env_id)
    assert len(found) > 15


def test_a_module_that_the_program_has_imported_is_allowed(monkeypatch: pytest.MonkeyPatch):
    gymnasium = pytest.importorskip("gymnasium")
    from types import ModuleType

    task = {**HOPPER, "env_id": "own_module:Own-v0"}
    monkeypatch.setitem(sys.modules, "own_module", ModuleType("own_module"))
    with pytest.raises(TaskError):
        task_of(task, None, "x")
    monkeypatch.setitem(gymnasium.registry, "Own-v0", gymnasium.spec("Hopper-v5"))
    assert task_of(task, None, "x").env_id == "own_module:Own-v0"
