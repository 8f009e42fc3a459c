"""What a recording says of itself is read: its clock, its simulator, its bounds, its rotations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_choosing import LENGTHS, STEPS, lerobot, robomimic

from flowpolicy.data import versions
from flowpolicy.data.importers import import_demonstrations, import_to_store
from flowpolicy.data.inspection import inspect_demonstrations, table
from flowpolicy.errors import DataError

h5py = pytest.importorskip("h5py")
pa = pytest.importorskip("pyarrow")
pytest.importorskip("zarr")


def clock(**late: float) -> np.ndarray:
    """Times at 10 Hz, with an extra wait before the given rows (``row_8=0.5``)."""
    times = np.concatenate([np.arange(n) / 10 for n in LENGTHS])
    for row, wait in late.items():
        number = int(row.removeprefix("row_"))
        end = np.cumsum(LENGTHS)[np.searchsorted(np.cumsum(LENGTHS), number, side="right")]
        times[number:end] += wait
    return times.astype(np.float32)


@pytest.mark.parametrize(
    ("wait", "refused"), [(0.5, True), (0.06, True), (0.04, False), (-0.2, True), (0.0, False)]
)
def test_a_gap_in_time_is_named(tmp_path: Path, wait: float, refused: bool, caplog):
    path = lerobot(tmp_path, {"timestamp": pa.array(clock(row_9=wait))})
    if not refused:
        assert import_demonstrations(path).num_steps == STEPS
        return
    with pytest.raises(DataError, match=r"'episode 1' has a step .* at 0\.\d+ s.*allow_gaps=true"):
        import_demonstrations(path)
    assert import_demonstrations(path, allow_gaps=True).num_steps == STEPS
    assert "'episode 1' has a step" in caplog.text


@pytest.mark.parametrize("fps", [None, 0, "ten", float("inf")])
def test_without_a_rate_times_say_nothing(tmp_path: Path, fps: Any):
    path = lerobot(tmp_path, {"timestamp": pa.array(clock(row_9=5.0))})
    info = json.loads((path / "meta" / "info.json").read_text())
    (path / "meta" / "info.json").write_text(json.dumps({**info, "fps": fps}))
    assert import_demonstrations(path).num_steps == STEPS


@pytest.mark.parametrize(("recorded", "warned"), [("1.4.1", True), ("1.5.0", False), (None, False)])
def test_another_version_of_robosuite_is_said(
    tmp_path: Path, recorded: str | None, warned: bool, caplog, monkeypatch
):
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: "1.5.2")
    path = robomimic(tmp_path / "a.hdf5", {})
    with h5py.File(path, "a") as file:
        env = {"env_name": "Lift", "type": 1} | ({"env_version": recorded} if recorded else {})
        file["data"].attrs["env_args"] = json.dumps(env)
    out = import_to_store(path, tmp_path / "out.zarr")
    inspection = inspect_demonstrations(out)
    assert inspection.attributes.get("env_version") == recorded
    for text in (caplog.text, table(inspection)):
        assert ("recorded under robosuite 1.4.1 and 1.5.2 is installed" in text) == warned


def test_robosuites_own_recordings_say_their_version(shared_data: Path):
    demos = import_demonstrations(shared_data / "robosuite_lift_human" / "demo.hdf5")
    assert demos.attributes["env_version"] == demos.attributes["source_repository_version"]


def rotating(steps: int) -> np.ndarray:
    """A rotation about z whose quaternion changes its sign in the middle, twice."""
    angle = np.linspace(0, 3, steps)
    values = np.stack([0 * angle, 0 * angle, np.sin(angle / 2), np.cos(angle / 2)], axis=1)
    values[steps // 3 : steps // 2] *= -1
    return values


def test_antipodal_quaternions_are_said_and_undone_when_asked(tmp_path: Path, caplog, monkeypatch):
    path = robomimic(tmp_path / "a.hdf5", {"obs/eef_quat": rotating, "obs/wxyz": rotating})
    recorded = import_demonstrations(path).arrays["eef_quat"]
    np.testing.assert_array_equal(recorded, np.concatenate([rotating(n) for n in LENGTHS]).astype(np.float32))
    assert "'obs/eef_quat' changes between q and -q" in caplog.text
    monkeypatch.setattr("flowpolicy.data.importers.source.BLOCK_BYTES", 200)  # across the ends of blocks too
    demos = import_demonstrations(path, continuous_quaternions=True)
    for start, end in zip(demos.episode_starts, demos.episode_ends, strict=True):
        rows = demos.arrays["eef_quat"][start:end]
        assert ((rows[1:] * rows[:-1]).sum(axis=1) > 0).all()
        np.testing.assert_array_equal(rows[0], recorded[start])
    np.testing.assert_allclose(np.abs(demos.arrays["eef_quat"]), np.abs(recorded))
    np.testing.assert_array_equal(demos.arrays["wxyz"], recorded)  # nothing says what it is


def bounded(write_sample: Callable[..., Path], low: Any, high: Any, second: float) -> Path:
    path = write_sample("minari")
    about = path / "data" / "metadata.json"
    space = {"type": "Box", "low": low, "high": high}
    about.write_text(json.dumps({**json.loads(about.read_text()), "action_space": json.dumps(space)}))
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        file["episode_1/actions"][3] = [0.5, second]
    return path


def test_minaris_bounds_hold_dimension_by_dimension(write_sample: Callable[..., Path]):
    path = bounded(write_sample, [-2.0, -1.0], [2.0, 1.0], 1.5)
    with pytest.raises(DataError, match=r"\[-1, 1\] in dimension 1 in 1 steps \(first at step 9\)"):
        import_demonstrations(path)
    clipped = import_demonstrations(path, out_of_bounds="clip")
    assert clipped.arrays["action"][9].tolist() == [0.5, 1.0]
    wide = import_demonstrations(path, action_bounds=[[-1, -1], [1, 2]])
    assert wide.arrays["action"][9].tolist() == [0.5, 1.5]


def test_a_dimension_without_bounds_is_free(write_sample: Callable[..., Path]):
    free = bounded(write_sample, [-1.0, float("-inf")], [1.0, float("inf")], 7.0)
    demos = import_demonstrations(free)
    assert demos.arrays["action"][9, 1] == 7
    assert demos.attributes["action_bounds"] == [[-1.0, None], [1.0, None]]
