"""What is shipped: small actors without pickle, and a ready Hopper store inside its band."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

pytest.importorskip("gymnasium")

import flowpolicy_configs
from flowpolicy.data.store import read_demonstrations
from flowpolicy_envs.actor import ExpertActor
from flowpolicy_envs.collection import ASSETS, MediumConfig, resolve_actors

ACTORS = sorted(ASSETS.glob("*.safetensors"))
CONFIGS = Path(flowpolicy_configs.__file__).parent / "env"


@pytest.mark.parametrize("path", ACTORS, ids=lambda path: path.stem)
def test_shipped_actors_are_small_and_say_where_they_come_from(path: Path) -> None:
    task = yaml.safe_load((CONFIGS / f"{path.stem.split('-')[0]}.yaml").read_text())
    info = ExpertActor.load(path).info
    assert path.stat().st_size < 1_000_000
    assert info.env_id == task["env_id"]
    assert info.command.startswith("python scripts/train_expert.py")
    assert "mujoco" in info.versions


@pytest.mark.parametrize("name", ["hopper", "walker2d", "halfcheetah"])
def test_the_actors_a_task_names_are_shipped(name: str) -> None:
    task = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    names = task["medium"]["actors"]
    assert len(names) >= 2
    found = resolve_actors(name, [*names, "expert"])
    assert len({actor.info.steps for actor in found.values()}) == len(found)


def test_the_embedded_hopper_store_is_what_its_attributes_say() -> None:
    task = yaml.safe_load((CONFIGS / "hopper.yaml").read_text())
    package, _, inside = task["demonstrations"].removeprefix("pkg://").partition("/")
    path = Path(str(importlib.import_module(package).__file__)).parent / inside
    assert path.stat().st_size < 6_000_000
    demos = read_demonstrations(path)
    returns = demos.episode_returns
    assert returns is not None
    low, high = MediumConfig(**task["medium"]).band or (0.0, 0.0)
    assert low <= returns.mean() <= high
    assert demos.attributes["return_mean"] == pytest.approx(returns.mean(), rel=1e-5)
    assert demos.attributes["env_id"] == task["env_id"]
    assert demos.arrays["observation"].shape[1:] == (11,)
    assert len(demos.attributes["actors"]) >= 2
