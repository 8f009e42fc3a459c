"""The example in docs/add_your_own_task.md runs as it stands there."""

from __future__ import annotations

import importlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from pages import ROOT, Page

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
pytest.importorskip("zarr")

from flowpolicy.data.store import read_demonstrations  # noqa: E402
from flowpolicy.evaluation.task import Task  # noqa: E402
from flowpolicy.settings import build  # noqa: E402

PATH = ROOT / "docs" / "add_your_own_task.md"


@pytest.fixture(scope="module")
def page() -> Page:
    if not PATH.exists():
        pytest.skip("the documentation is not part of an installed package")
    return Page.read(PATH)


def test_the_example_goes_from_expert_to_store(page: Page, tmp_path: Path) -> None:
    experts = pytest.importorskip("flowpolicy_envs.experts")
    from flowpolicy_envs.collection import collect_store

    env = yaml.safe_load(page.files["tasks/env/balance.yaml"])
    task = build(Task, {item.name: env[item.name] for item in fields(Task) if item.name in env}, "env")
    recipe = build(experts.ExpertConfig, env["expert"], "env.expert")
    recipe = replace(recipe, total_steps=1024, checkpoint_every=512, eval_episodes=1)
    actors = experts.train_expert(
        task.env_id, recipe, tmp_path / "run", progress_bar=False, env_kwargs=task.env_kwargs
    )
    env["medium"]["actors"] = [512, 1024]
    out = tmp_path / "store.zarr.zip"
    collect_store(env, level="medium", out=out, steps=200, actors_dir=actors)
    demos = read_demonstrations(out)
    assert demos.num_steps >= 200
    assert demos.episode_lengths.max() <= 200
    assert demos.attributes["task"] == "balance"


def test_the_wrapper_of_the_page_reports_success(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.write_files(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    env = Task("upright", "upright:Upright-v0", metric="success").make()
    env.reset(seed=0)
    assert env.step(np.zeros(1, np.float32))[4]["success"] is True
    pushed = [env.step(np.full(1, 3.0, np.float32))[4]["success"] for _ in range(3)]
    assert pushed[-1] is False
    gymnasium.registry.pop("Upright-v0")
