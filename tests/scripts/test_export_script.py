"""A store leaves for robomimic and comes back, by the two commands of the documents."""

import json

import numpy as np
import pytest
from script_runs import run_script

from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.store import read_demonstrations, write_demonstrations

pytest.importorskip("hydra")
pytest.importorskip("h5py")


@pytest.mark.usefixtures("empty_figures")
def test_a_store_leaves_and_comes_back(tmp_path, repo_root, demos):
    write_demonstrations(tmp_path / "mine.zarr.zip", demos)
    run_dir = f"run_dir={tmp_path / 'export'}"
    command = (tmp_path, repo_root, "export_demos.py", "path=mine.zarr.zip", "out=mine.hdf5", run_dir)
    done = run_script(*command, "validation_fraction=0.25")
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "export" / "summary.json")
    summary = json.loads((tmp_path / "export" / "summary.json").read_text())
    assert summary["metrics"] == {"episodes": 4, "file": "mine.hdf5"}
    run_script(
        tmp_path, repo_root, "import_demos.py", "source=mine.hdf5", "out=back.zarr.zip", "run_dir=import"
    )
    back = read_demonstrations(tmp_path / "back.zarr.zip")
    np.testing.assert_array_equal(back.arrays["action"], demos.arrays["action"])
    assert {name: len(episodes) for name, episodes in back.masks.items()} == {"train": 3, "valid": 1}
    to_lerobot = (*command[:4], "out=mine", "format=lerobot", "fps=10", "task='lift it'", run_dir)
    pytest.importorskip("pyarrow")
    run_script(*to_lerobot)
    demos_again = import_demonstrations(tmp_path / "mine")
    np.testing.assert_array_equal(demos_again.arrays["action"], demos.arrays["action"])
    assert demos_again.attributes["tasks"] == ["lift it"]
    again = run_script(*command, fails=True)
    assert "mine.hdf5 exists already" in again.stderr
