"""Every task's file names an environment that can be made and that says what its file says."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from flowpolicy.evaluation.task import Task
from flowpolicy.settings import build

gymnasium = pytest.importorskip("gymnasium")

import flowpolicy_configs  # noqa: E402
from flowpolicy_envs import register_environments  # noqa: E402
from flowpolicy_envs.collection import MediumConfig  # noqa: E402
from flowpolicy_envs.scripted import ScriptedConfig  # noqa: E402

CONFIGS = sorted((Path(flowpolicy_configs.__file__).parent / "env").glob("*.yaml"))
BEYOND_TASK = {"demonstrations", "demo_transform", "expert", "medium"}
RARE = {"action_bounds", "instruction", "rotations"}  # of a task, where it has any
OPTIONAL = {"pretrain", "finetune", "observation_keys", "scripted", "native"}
NEEDS = {
    "pusht": "gym_pusht",
    "adroit": "gymnasium_robotics",
    "fetch": "gymnasium_robotics",
    "franka": "gymnasium_robotics",
    "metaworld": "metaworld",
}
NEEDS |= dict.fromkeys(("lift", "can", "square", "transport", "tool"), "robomimic")


@cache
def _read(path: Path) -> tuple[Task, dict[str, Any]]:
    with initialize_config_module("flowpolicy_configs", version_base="1.3"):  # a task may build on another
        values: Any = OmegaConf.to_container(compose(overrides=[f"+env={path.stem}"]).env, resolve=True)
    task = {item.name: values.pop(item.name) for item in fields(Task) if item.name not in RARE - {*values}}
    return build(Task, task, "env"), values


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_task_file_matches_its_environment(path: Path, request: pytest.FixtureRequest) -> None:
    task, rest = _read(path)
    assert task.name == path.stem or task.name.startswith(f"{path.stem}-")  # "-" and which of a family
    assert set(rest) - OPTIONAL == BEYOND_TASK
    needs = NEEDS.get(path.stem.split("_")[0], "mujoco")
    pytest.importorskip(needs)
    if needs == "robomimic":
        request.getfixturevalue("models_compiled_once")
    env = task.make()
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    rate = env.metadata["render_fps"] if task.name.startswith("pusht") else 1.0 / env.get_wrapper_attr("dt")
    assert task.control_hz == pytest.approx(rate, rel=1e-3)
    _, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert isinstance(float(reward), float)
    assert not terminated
    assert not truncated
    if task.metric in ("success", "score"):
        assert isinstance(info["success"], bool)
    env.close()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_expert_recipe_and_band_are_valid(path: Path) -> None:
    _, rest = _read(path)
    if rest["expert"] is None:
        pytest.skip("this task has other demonstrations and no recipe for an expert")
    experts = pytest.importorskip("flowpolicy_envs.experts")
    recipe = build(experts.ExpertConfig, rest["expert"], "env.expert")
    assert recipe.total_steps > recipe.checkpoint_every
    build(MediumConfig, rest["medium"], "env.medium")


def test_bands_are_those_of_the_medium_level() -> None:
    bands = {path.stem: _read(path)[1]["medium"] for path in CONFIGS}
    assert bands["hopper"]["band"] == [1200, 1700]
    assert bands["walker2d"]["band"] == [2000, 2900]
    assert bands["halfcheetah"]["band"] == [3000, 5000]


def test_registering_twice_changes_nothing() -> None:
    before = dict(gymnasium.registry)
    register_environments()
    assert dict(gymnasium.registry) == before


def test_same_seed_gives_the_same_start() -> None:
    pytest.importorskip("gym_pusht")
    first, second = (gymnasium.make("flowpolicy_envs:flowpolicy/PushT-v0").reset(seed=3)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_scripted_expert_is_there_and_takes_its_settings(path: Path) -> None:
    _, rest = _read(path)
    if not rest.get("scripted"):
        pytest.skip("this task has no scripted expert")
    is_recorded = rest["scripted"]["expert"].endswith(":DapgExpert")  # the task's own are a person's
    assert rest["demonstrations"].endswith("-human.zarr.zip" if is_recorded else "-scripted.zarr.zip")
    build(ScriptedConfig, rest["scripted"], "env.scripted").make()
