"""Files of earlier versions are read, and give what they gave then; existing_files/make.py made them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "existing_files"
IMAGES = "tests/existing_files/images"  # the checkpoint of the plan
NUMBERS: dict[str, dict[str, Any]] = json.loads((FOLDER / "numbers.json").read_text())["numbers"]
TOLERANCE = float(os.environ.get("FLOWPOLICY_TEST_TOLERANCE", "2e-5"))
"""Of an action, as a share of its range. The machine that recorded the numbers keeps 1e-6."""
TRAINED = 50 if "FLOWPOLICY_TEST_TOLERANCE" not in os.environ else 1
"""Times the tolerance: a training step in between enlarges the differences between processors."""


def every(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", NUMBERS[kind])


@pytest.fixture(scope="module")
def readings() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import readings
    finally:
        sys.path.pop(0)
    return readings


def assert_same(found: Any, recorded: Any, action_range: Any, times: int = 1) -> None:
    wanted = np.array([row.split() for row in recorded], np.float32).reshape(found.shape)
    difference = np.abs(found - wanted) / action_range
    assert difference.max() <= TOLERANCE * times, difference.max()


@every("checkpoint")
def test_a_checkpoint_gives_the_same_chunk_and_is_known_by_the_same_hash(readings: Any, name: str):
    found, recorded = readings.checkpoint(name), NUMBERS["checkpoint"][name]
    question = readings.Question.of_checkpoint(readings.ROOT / name)
    assert_same(found["chunk"], recorded["chunk"], question.action_range)
    assert found["fingerprint"] == recorded["fingerprint"]


@every("schedule")
def test_a_cache_schedule_fits_its_checkpoint_and_gives_the_same_chunk(readings: Any, name: str):
    found, recorded = readings.schedule(name), NUMBERS["schedule"][name]
    question = readings.Question.of_checkpoint(readings.ROOT / readings.SCHEDULES[name])
    assert_same(found["chunk"], recorded["chunk"], question.action_range)
    assert (found["method"], found["share"]) == (recorded["method"], recorded["share"])


@every("plan")
def test_a_plan_says_the_same(readings: Any, name: str):
    assert readings.plan(name) == NUMBERS["plan"][name]
    assert NUMBERS["plan"][name]["fingerprint"] == NUMBERS["checkpoint"][IMAGES]["fingerprint"]


@every("model")
def test_a_reinflow_model_predicts_and_deploys_the_same(readings: Any, name: str):
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    found, recorded = readings.model(name), NUMBERS["model"][name]
    action_range = readings.Question.of_model(FOLDER / name).action_range
    for what in ("prediction", "chunk"):
        assert_same(found[what], recorded[what], action_range)
    for what in ("iteration", "num_timesteps"):
        assert found[what] == recorded[what]


@every("store")
def test_a_store_holds_the_same(readings: Any, name: str):
    pytest.importorskip("zarr", reason="zarr is not installed")
    found, recorded = readings.store(name), NUMBERS["store"][name]
    assert found["arrays"].keys() == recorded["arrays"].keys()
    for key, (dtype, shape, total) in recorded["arrays"].items():
        assert found["arrays"][key] == [dtype, shape, pytest.approx(total, rel=1e-12)]
    assert found["attributes"] == recorded["attributes"]


@pytest.mark.slow
@every("unfinished")
def test_an_interrupted_run_goes_on_to_the_same_policy(
    readings: Any, name: str, tmp_path: Path, forking_python: Path
):
    for package in ("hydra", "mujoco", "stable_baselines3"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    found, recorded = (
        readings.unfinished(name, tmp_path / name, str(forking_python)),
        NUMBERS["unfinished"][name],
    )
    action_range = readings.Question.of_checkpoint(tmp_path / name / "checkpoint").action_range
    assert_same(found["chunk"], recorded["chunk"], action_range, TRAINED)
    assert found["steps"] == recorded["steps"]
