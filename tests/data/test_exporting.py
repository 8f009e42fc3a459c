"""Demonstrations come back as they were from the formats of other projects that they are written in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.lerobot_writing import write_lerobot
from flowpolicy.data.robomimic_writing import write_robomimic
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import DataError

for module in ("h5py", "pyarrow", "av"):
    pytest.importorskip(module)

FORMATS = {"robomimic": write_robomimic, "lerobot": write_lerobot}


def assert_same(back: Demonstrations, demos: Demonstrations) -> None:
    assert set(back.arrays) == set(demos.arrays)
    for key, array in demos.arrays.items():
        np.testing.assert_array_equal(back.arrays[key], array, err_msg=key)
        assert back.arrays[key].dtype == array.dtype
        assert back.feature(key) == demos.feature(key)
    np.testing.assert_array_equal(back.episode_ends, demos.episode_ends)
    kept = {key: value for key, value in demos.attributes.items() if key != "kinds"}
    assert {key: back.attributes.get(key) for key in kept} == kept


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_everything_comes_back(write: Callable[..., Path], recorded: Demonstrations, tmp_path: Path):
    path = write(tmp_path / "out.hdf5", recorded)
    back = import_demonstrations(path)
    assert_same(back, recorded)
    assert back.feature("task") == recorded.feature("task")
    assert back.attributes["kinds"]["task"] == "text"
    again = import_demonstrations(write(tmp_path / "again.hdf5", back))
    assert_same(again, recorded)
    with pytest.raises(DataError, match="exists already"):
        write(path, recorded)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_what_the_format_alone_needs_does_not(
    write: Callable[..., Path], recorded: Demonstrations, tmp_path: Path
):
    """Rewards, ends and a task that the demonstrations do not have."""
    plain = {key: recorded.arrays[key] for key in ("action", "observation")}
    demos = Demonstrations(plain, recorded.episode_ends, {"fps": 20})
    back = import_demonstrations(write(tmp_path / "out.hdf5", demos))
    assert_same(back, demos)
    assert not {"tasks", "masks", "env_id"} & set(back.attributes)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("task", ["\ud800", "a\0b"])
def test_words_that_no_file_can_hold_are_refused(
    write: Callable[..., Path], task: str, recorded: Demonstrations, tmp_path: Path
):
    recorded.attributes["tasks"] = ["push", task]
    with pytest.raises(DataError, match=r"attribute 'tasks' has .* which no file can hold"):
        write(tmp_path / "out.hdf5", recorded)
