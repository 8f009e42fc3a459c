"""The task's file that an import writes, and the rules behind its numbers."""

from __future__ import annotations

import numpy as np
import pytest

from flowpolicy.data.inspection import inspect_demonstrations
from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.evaluation.task import check_keys, task_from
from flowpolicy.evaluation.task_file import horizons, task_file_of, training, write_task_file

pytest.importorskip("zarr")
omegaconf = pytest.importorskip("omegaconf")


def written(folder, arrays, attributes, steps=40, name="my.zarr.zip"):
    """The task of a recording of two episodes, and the text of its file."""
    store = folder / name
    ends = [steps // 2, steps]
    write_demonstrations(store, Demonstrations(arrays, ends, attributes))
    path = write_task_file(task_file_of(store), inspect_demonstrations(store), store)
    return omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(path)), path.read_text()


def recorded(steps=40, **more):
    rng = np.random.default_rng(0)
    return {
        "action": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "observation": rng.normal(size=(steps, 3)).astype(np.float32),
        **more,
    }


def test_it_is_a_task_without_a_simulator_with_the_rate_the_keys_and_the_bounds_of_the_recording(tmp_path):
    arrays = recorded(
        front=np.random.default_rng(0).integers(0, 256, (40, 12, 10, 3), dtype=np.uint8),
        still=np.ones((40, 4), np.float32),
        **{"next.success": np.arange(40) % 20 == 19, "reward": np.zeros(40, np.float32)},
    )
    names = {"action": ["pan", "grip:\x07yes"], "observation.state": ["x", "y", "z"]}
    settings, text = written(tmp_path, arrays, {"fps": 20, "dimension_names": names})
    check_keys(settings)
    task = task_from(settings)
    assert task.env_id is None
    assert (task.name, task.control_hz, task.safe_action) == ("my", 20.0, "hold")
    assert settings["observation_keys"] == ["front", "observation"]
    assert (task.obs_horizon, task.action_horizon, task.execute_horizon) == (
        1,
        20,
        10,
    )  # the episode's length
    low, high = (np.asarray(bound, np.float32) for bound in task.action_bounds)
    np.testing.assert_array_equal(low, arrays["action"].min(0))
    np.testing.assert_array_equal(high, arrays["action"].max(0))
    assert settings["demonstrations"] == "my.zarr.zip"
    assert "vector of 3: x, y, z" in text
    assert "pan, grip: yes" in text
    assert "image of 12 x 10, 3 channels" in text
    assert "left out: still, which never changes" in text
    assert "left out: next.success" in text


def test_names_that_yaml_takes_for_something_else_stay_names(tmp_path):
    arrays = recorded(**{"on": recorded()["observation"], "a: b #1": recorded()["observation"]})
    settings, _ = written(tmp_path, arrays, {"fps": 10.0}, name="an arm (1).zarr.zip")
    assert settings["observation_keys"] == ["a: b #1", "observation", "on"]
    assert settings["demonstrations"] == "an arm (1).zarr.zip"
    assert task_from(settings).name == "an arm -1-"


def test_several_tasks_in_words_are_observed_and_one_is_not(tmp_path):
    index = np.repeat([0, 1], 20)
    settings, _ = written(tmp_path, recorded(task_index=index), {"fps": 10.0, "tasks": ["lift", "push"]})
    assert settings["observation_keys"] == ["observation", "task"]
    settings, _ = written(
        tmp_path, recorded(task_index=0 * index), {"fps": 10.0, "tasks": ["lift", "push"]}, name="one.zarr"
    )
    assert settings["observation_keys"] == ["observation"]


def test_a_rate_that_is_not_declared_is_left_to_the_user(tmp_path):
    _, text = written(tmp_path, recorded(), {})
    assert "control_hz: ???" in text
    with pytest.raises(omegaconf.MissingMandatoryValue):
        _ = omegaconf.OmegaConf.load(tmp_path / "my.yaml").control_hz


@pytest.mark.parametrize(
    ("control_hz", "length", "has_images", "expected"),
    [
        (10.0, 125, True, (1, 16, 8)),
        (30.0, 300, True, (1, 48, 24)),
        (50.0, 400, False, (2, 64, 32)),
        (500.0, 4000, False, (2, 64, 32)),
        (2.0, 100, False, (2, 8, 4)),
        (30.0, 21, False, (2, 20, 10)),
        (30.0, 1, False, (2, 2, 1)),
    ],
)
def test_a_chunk_lasts_1_6_seconds_within_its_limits_and_half_of_it_is_executed(
    control_hz, length, has_images, expected
):
    found = horizons(control_hz, length, has_images=has_images)
    assert (found.observation, found.action, found.execute) == expected


@pytest.mark.parametrize(
    ("steps", "has_images", "expected"),
    [
        (25_650, True, (16_000, 64)),
        (25_650, False, (4000, 128)),
        (300, True, (2000, 64)),
        (10**6, True, (20_000, 64)),
    ],
)
def test_training_passes_twenty_times_and_with_images_forty_times_over_the_recording_within_its_limits(
    steps, has_images, expected
):
    assert training(steps, has_images=has_images) == expected


@pytest.mark.parametrize(
    ("store", "file"), [("a/my.zarr.zip", "a/my.yaml"), ("my.zarr", "my.yaml"), ("my.v2.zarr", "my.v2.yaml")]
)
def test_the_file_lies_beside_the_store(store, file):
    assert str(task_file_of(store)) == file
